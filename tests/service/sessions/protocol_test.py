"""The exactly-once protocol, model-checked: clients, two gateways and a store, with failures at every step.

At all times the history that a session has committed is a prefix of what its client sends, each chunk once; what a
client is told is what the undisturbed run gives; and what was acknowledged is there, unless the store itself lost it,
which the client is then told.
"""

import asyncio
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from service.errors import CommitUnknown, ExecutorUnavailable, PositionMismatch, StoreUnavailable
from service.sessions import cohort as keeping
from service.sessions.memory import MemoryStore
from service.sessions.redis import RedisStore
from tests.service.sessions.benches import PATIENCE
from tests.service.sessions.protocol import Way, World, fail, unavailable, unknown

pytestmark = pytest.mark.slow

places = st.integers(0, 1)
places_of_both = (0, 1)
# A step goes by itself only where its gateway has the session at hand: it is drawn more often, to get there as often.
ways = st.sampled_from([Way.LONG, Way.EXPRESS, Way.SINGLE, Way.SINGLE, Way.SINGLE])
picks = st.integers(0, 10_000)
_prefixes = itertools.count()


@pytest.fixture(scope="module", autouse=True)
def _states_are_kept_however_small():
    """Those of these tests are."""
    before, keeping.LEAST_KEPT_BYTES = keeping.LEAST_KEPT_BYTES, 0
    yield
    keeping.LEAST_KEPT_BYTES = before


class MemoryBackend:
    """One store for both gateways, which outlives them."""

    def __init__(self):
        self.store = MemoryStore(max_sessions=10, clock=lambda: 1000.0, large_cohort=2)

    def make_store(self):
        return self.store

    def snapshot(self):
        return dict(self.store._sessions)

    def restore(self, snapshot):
        self.store._sessions = dict(snapshot)
        self.store._ids = {}
        for key in sorted(snapshot):
            self.store._ids.setdefault(key.principal, []).append(key.session_id)

    async def close(self):
        await self.store.close()


class ValkeyBackend:
    """A real server; each gateway has a store, and so copies of sessions, of its own."""

    def __init__(self, valkey):
        self.valkey = valkey
        self.prefix = f"model{next(_prefixes)}:"
        self.stores = []

    def make_store(self):
        self.stores.append(RedisStore(self.valkey.url, max_sessions=10, prefix=self.prefix, **PATIENCE))
        return self.stores[-1]

    def snapshot(self):
        client = self.valkey.client
        return {key: client.dump(key) for key in client.keys(f"{self.prefix}*")}

    def restore(self, snapshot):
        client = self.valkey.client
        client.delete(*client.keys(f"{self.prefix}*"))
        for key, value in snapshot.items():
            client.restore(key, 3_600_000, value)

    async def close(self):
        for store in self.stores:
            await store.close()


class Protocol(RuleBasedStateMachine):
    """Rules are what the world may do; a subclass has ``make_backend`` and a ``tally``."""

    def __init__(self):
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.backend = self.make_backend()
        self.snapshots = []
        self.world = self.loop.run_until_complete(World(self.make_store, self.tally).start("ab"))
        self.reader = self.make_store()

    def make_store(self):
        return self.backend.make_store()

    @rule(who=places, gateway=places, gates=st.integers(0, 5), way=ways)
    def send(self, who, gateway, gates, way):
        """A client sends the chunk that is next, or sends it again; it gets as far as it may."""
        client, gateway = self.world.clients[who], self.world.gateways[gateway]
        if len(self.world.attempts) >= 5:
            return
        self.remember()
        self.do(self.world.send, client, gateway, client.acknowledged, way)
        for _ in range(gates):
            self.open(next((gate for gate in reversed(self.world.gates) if gate.gateway is gateway), None))

    @rule(gateway=places, gates=st.integers(0, 8))
    def send_together(self, gateway, gates):
        """All clients send what is next in one message."""
        gateway = self.world.gateways[gateway]
        if len(self.world.attempts) >= 5:
            return
        self.remember()
        chunks = [(client, client.acknowledged) for client in self.world.clients]
        self.do(self.world.send_together, chunks, gateway)
        for _ in range(gates):
            self.open(next((gate for gate in reversed(self.world.gates) if gate.gateway is gateway), None))

    @precondition(lambda self: not self.world.gates)
    @rule(gateway=places)
    def step_together_to_the_end(self, gateway):
        """Twice, so that what is kept together is stepped together; what comes next may find it so."""
        for _ in range(2):
            self.send_together(gateway, 0)
            for _ in range(20):
                self.open(next(iter(self.world.gates), None))

    @precondition(lambda self: not self.world.gates)
    @rule(who=places, way=ways)
    def race(self, who, way):
        """The same chunk on both gateways at once, up to their commits."""
        for place in places_of_both:
            self.send(who, place, 2, way)

    @precondition(lambda self: not self.world.gates)
    @rule()
    def race_together(self):
        """Likewise of all clients at once."""
        for place in places_of_both:
            self.send_together(place, 2)

    @precondition(lambda self: self.world.gates)
    @rule(pick=picks, often=st.integers(1, 4))
    def go_on(self, pick, often):
        for _ in range(often):
            if self.world.gates:
                self.open(self.world.gates[pick % len(self.world.gates)])

    @precondition(lambda self: self.at("commit"))
    @rule(pick=picks)
    def commit(self, pick):
        gates = self.at("commit")
        self.open(gates[pick % len(gates)])

    @precondition(lambda self: self.world.attempts)
    @rule(pick=picks)
    def cancel(self, pick):
        """A caller goes away, or its time limit passes."""
        attempt = self.world.attempts[pick % len(self.world.attempts)]
        self.do(attempt.task.cancel)

    @rule(place=places)
    def crash(self, place):
        """A gateway dies where it is; another takes its place, with nothing but the store."""
        self.loop.run_until_complete(self.world.crash(place))
        self.settle()

    @precondition(lambda self: self.at("load", "commit"))
    @rule(pick=picks)
    def store_is_down(self, pick):
        gates = self.at("load", "commit")
        self.do(fail, gates[pick % len(gates)], unavailable())

    @precondition(lambda self: self.at("committed"))
    @rule(pick=picks)
    def answer_of_a_commit_is_lost(self, pick):
        gates = self.at("committed")
        self.do(fail, gates[pick % len(gates)], unknown())

    @precondition(lambda self: self.at("commit"))
    @rule(pick=picks)
    def commit_is_late(self, pick):
        gates = self.at("commit")
        self.do(gates[pick % len(gates)].go_on.set_result, "late")

    @precondition(lambda self: self.world.late)
    @rule(pick=picks)
    def late_commit_arrives(self, pick):
        self.loop.run_until_complete(self.world.deliver(pick % len(self.world.late)))

    @precondition(lambda self: self.at("executor"))
    @rule(pick=picks)
    def model_is_down(self, pick):
        gates = self.at("executor")
        self.do(fail, gates[pick % len(gates)], ExecutorUnavailable("made to fail"))

    @precondition(lambda self: self.snapshots)
    @rule(pick=st.integers(0, 3))
    def failover_loses_writes(self, pick):
        """A replica that was some steps behind takes over: what was committed since is gone."""
        snapshot, numbers = self.snapshots[pick % len(self.snapshots)]
        self.backend.restore(snapshot)
        for client, number in zip(self.world.clients, numbers, strict=True):
            client.floor = number if client.floor is None else min(client.floor, number)
        self.snapshots.clear()

    @precondition(lambda self: self.snapshots and len({gate.gateway for gate in self.at("commit")}) == 1)
    @rule()
    def failover_ahead_of_a_commit(self):
        """The client goes back and does it again on the other gateway, while a commit on what was lost waits."""
        waiting = self.at("commit")[0].gateway
        self.failover_loses_writes(0)
        for client in self.world.clients:
            for _ in range(3):
                self.send(self.world.clients.index(client), 1 - self.world.gateways.index(waiting), 8, Way.LONG)

    def remember(self):
        """How the store is now, in case that a failover brings it back."""
        self.snapshots.append((self.backend.snapshot(), [self.stored(client)[0] for client in self.world.clients]))
        del self.snapshots[:-4]

    @invariant()
    def the_committed_history_is_a_prefix_of_what_was_sent(self):
        for client in self.world.clients:
            number, session = self.stored(client)
            assert session.position == client.position(number), "the session stands inside of a chunk"
            _, state = client.prefix(number)
            if state is None:
                assert session.state is None
            else:
                np.testing.assert_array_equal(session.state, state)
            lowest = client.acknowledged if client.floor is None else client.floor
            assert lowest <= number <= client.sent, "an acknowledged chunk is lost, or one was never sent"

    def teardown(self):
        """In the end everything gets through: nothing is stuck, and the histories are whole."""
        try:
            self.finish()
        finally:
            self.loop.run_until_complete(self.world.close())
            self.loop.run_until_complete(self.backend.close())
            self.loop.close()

    def finish(self):
        for client in self.world.clients:
            target, client_sends = client.acknowledged + 2, 0
            while client.acknowledged < target:
                way = list(Way)[client_sends % len(Way)]
                self.do(self.world.send, client, self.world.gateways[0], client.acknowledged, way)
                while self.world.gates:
                    self.open(self.world.gates[0])
                self.the_committed_history_is_a_prefix_of_what_was_sent()
                client_sends += 1
                assert client_sends < 20, "the session does not go on"
        while self.world.late:
            self.loop.run_until_complete(self.world.deliver(0))
        self.the_committed_history_is_a_prefix_of_what_was_sent()

    def do(self, action, *arguments):
        """Does one thing on the event loop, then lets everything run as far as it goes."""

        async def act():
            action(*arguments)
            await self.world.settle()

        self.loop.run_until_complete(act())
        self.settle()

    def open(self, gate):
        if gate is not None:
            self.do(gate.go_on.set_result, None)

    def settle(self):
        self.loop.run_until_complete(self.world.settle())
        ended = [attempt for attempt in self.world.attempts if attempt.task.done()]
        self.world.attempts = [attempt for attempt in self.world.attempts if not attempt.task.done()]
        for attempt in ended:
            self.tell(attempt)

    def tell(self, attempt):
        """The client hears what became of an attempt."""
        client, number = attempt.session, attempt.chunk
        if attempt.task.cancelled():
            return
        error = attempt.task.exception()
        if error is None:
            reply = attempt.task.result()
            assert reply.position == client.position(number + 1)
            np.testing.assert_array_equal(reply.outputs, client.outputs(number))
            client.acknowledged = max(client.acknowledged, number + 1)
            if self.stored(client)[0] >= client.acknowledged and self.is_alone(client):
                client.floor = None  # what the failover lost is there again
        elif isinstance(error, PositionMismatch):
            self.mismatch(client, number, int(error.metadata["position"]))
        else:
            assert isinstance(error, StoreUnavailable | CommitUnknown | ExecutorUnavailable), error

    def mismatch(self, client, number, position):
        """The chunk is one that is over, or the store has lost writes: then the client goes back, knowing it."""
        if number != client.acknowledged:
            return  # one that is over, or that was sent before the client went back
        assert client.floor is not None, "a client that did nothing wrong was told that it had"
        back = client.number_at(position)
        assert back <= client.acknowledged
        client.acknowledged = back
        if self.stored(client)[0] == back and self.is_alone(client):
            client.floor = None
            # Nor may a commit of it that was given up be on its way: it would be the client's own fault.
            if not self.world.late and not self.at("commit"):
                client.branch(back)  # what it sends from now on is another history

    def is_alone(self, client):
        """Whether nothing of it is under way: a step may have been written, then lost, and be acknowledged only now."""
        return not any(attempt.session is client for attempt in self.world.attempts)

    def at(self, *labels):
        return [gate for gate in self.world.gates if gate.label in labels]

    def stored(self, client):
        """How many chunks the store has of a session, and the session."""
        session = self.loop.run_until_complete(self.reader.load(client.key, fresh=True))
        return client.number_at(session.position), session


def _check(new_backend, examples, **more):
    tally = Counter()
    machine = type("Machine", (Protocol,), {"tally": tally, "make_backend": staticmethod(new_backend)})
    options = settings(
        max_examples=examples,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)
    # It has been where it can go wrong: with far fewer of these, the model would have lost its teeth.
    wanted = {
        "committed": 2 * examples,
        "late": examples // 20,
        "replay": examples // 20,
        "express": examples // 2,
        "single": examples // 8,
        "together": examples // 40,
        **more,
    }
    assert all(tally[what] >= least for what, least in wanted.items()), tally


def test_exactly_once_over_memory():
    _check(MemoryBackend, 120, cohorts=120, cohorts_again=60)


def test_exactly_once_over_valkey(valkey):
    _check(lambda: ValkeyBackend(valkey), 80)


@pytest.fixture(params=["memory", "valkey"])
async def backend(request):
    backend = MemoryBackend() if request.param == "memory" else ValkeyBackend(request.getfixturevalue("valkey"))
    yield backend
    await backend.close()


async def test_a_step_that_ran_on_a_lost_history_is_run_again_on_the_real_one(backend):
    """It stands at the commit when a failover loses the step before it. Through another gateway something else is sent
    in place of that: the position is as it was, only the token tells that this is another history."""
    tally = Counter()
    world = await World(backend.make_store, tally).start("a")
    client, (one, two) = world.clients[0], world.gateways
    lost = backend.snapshot()
    await through(world, one, 0)
    world.send(client, one, 1)
    await until(world, "commit")
    waiting = world.gates[0]
    backend.restore(lost)
    client.replace(0)
    await through(world, two, 0)
    waiting.go_on.set_result(None)
    reply = await finish(world, world.attempts[-2])
    np.testing.assert_array_equal(reply.outputs, client.outputs(1))
    assert tally["run"] == 1
    session = await backend.make_store().load(client.key, fresh=True)
    np.testing.assert_array_equal(session.state, client.prefix(2)[1])
    await world.close()


async def until(world, label):
    """Opens the gates before ``label``."""
    await world.settle()
    while world.gates[-1].label != label:
        world.gates[-1].go_on.set_result(None)
        await world.settle()


async def through(world, gateway, number):
    """Sends a chunk and lets it through to its reply."""
    held = set(world.gates)
    world.send(world.clients[0], gateway, number)
    await finish(world, world.attempts[-1], held)


async def finish(world, attempt, held=frozenset()):
    await world.settle()
    while not attempt.task.done():
        free = [gate for gate in world.gates if gate not in held]
        assert free, f"it waits for nothing that a gate holds: {waiting_in(attempt.task)}"
        free[0].go_on.set_result(None)
        await world.settle()
    return attempt.task.result()


def waiting_in(task):
    """Where a task stands: its coroutines, and what the innermost waits for."""
    there, found = task.get_coro(), []
    while hasattr(there, "cr_frame"):
        found.append(f"{there.__qualname__}:{there.cr_frame and there.cr_frame.f_lineno}")
        there = there.cr_await
    return [*found, there]
