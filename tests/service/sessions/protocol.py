"""The world of the protocol's model: real engines over a real store, stopped at every point where they can be.

A gateway runs until it comes to a gate: before and after each read, each run of the model and each commit. The test
decides which goes on, which fails, and which gateway dies there.
"""

import asyncio
import enum
import itertools
from typing import NamedTuple

import numpy as np

from service.admission import Admission
from service.batcher import Batcher, BatchPolicy
from service.digests import digest_of
from service.engine import Engine
from service.errors import CommitUnknown, ServiceError, StoreUnavailable
from service.sessions import Committed, Refused
from service.sessions.cohort import Cohort
from service.sessions.redis import RedisStore
from service.types import SessionKey, StepCall
from tests.service.sessions.chain import ChainExecutor, run_chain
from tests.service.support import alike

# Seconds that nothing here takes; sessions live longer.
_FAR = 600.0
# Time steps of the chunks of a sequence, over and over.
_LENGTHS = (1, 3, 2, 2, 1, 3, 3, 1, 2)


class Way(enum.Enum):
    """How a gateway takes steps."""

    LONG = enum.auto()
    EXPRESS = enum.auto()
    SINGLE = enum.auto()


class Gate(NamedTuple):
    """Where something waits."""

    gateway: object
    label: str
    go_on: asyncio.Future


class GatedStore:
    """A store whose reads and commits wait before and after; a commit can also be left to arrive later."""

    def __init__(self, store, gateway):
        self.store = store
        self._gateway = gateway

    async def load(self, key, *, fresh=False):
        await self._gateway.gate("load")
        return await self._gateway.world.run(self.store.load(key, fresh=fresh))

    async def extend(self, key, seconds):
        await self._gateway.world.run(self.store.extend(key, seconds))

    async def commit(self, key, commit):
        return await self._commit(key, commit, lambda: self.store.commit(key, commit))

    async def _commit(self, key, commit, ask):
        if await self._gateway.gate("commit") == "late":
            self._gateway.world.late.append((self.store, key, commit))
            self._gateway.world.tally["late"] += 1
            raise CommitUnknown("the commit is still on its way")
        outcome = await self._gateway.world.run(ask())
        self._gateway.world.count(outcome)
        await self._gateway.gate("committed")
        return outcome

    def cohorts_now(self, principal, session_ids, seconds):
        return self.store.cohorts_now(principal, session_ids, seconds)

    def load_now(self, keys):
        return self.store.load_now(keys)

    def extend_now(self, sessions, seconds):
        return self.store.extend_now(sessions, seconds)

    def commit_soon(self, sessions, commits, tell):
        """They wait at the same gates, each by itself or all at once, as the store writes them.

        A crash of their gateway ends them where they are.
        """
        self._gateway.world.tally["express"] += len(commits)
        commit = self._commit_each if isinstance(self.store, RedisStore) else self._commit_all
        self._gateway.keep(asyncio.create_task(commit(sessions, commits, tell)))

    def at_hand(self, key, seconds):
        return self.store.at_hand(key, seconds)

    def commit_one_soon(self, session, commit, tell):
        """Likewise."""
        self._gateway.world.tally["single"] += 1

        async def tell_one():
            tell(await self._commit_one(session, commit))

        self._gateway.keep(asyncio.create_task(tell_one()))

    async def _commit_all(self, sessions, commits, tell):
        world = self._gateway.world
        try:
            if await self._gateway.gate("commit") == "late":
                for at, session in enumerate(sessions):
                    world.late.append((self.store, session.info.key, commits.of(at, session)))
                    world.tally["late"] += 1
                raise CommitUnknown("the commits are still on their way")
            told = []
            self.store.commit_soon(sessions, commits, told.append)
            (told,) = told
            world.tally["cohorts"] += isinstance(told, Cohort)
            world.tally["cohorts_again"] += isinstance(sessions, Cohort)
            for one in told:
                if not isinstance(one, Exception):
                    world.count(one if isinstance(one, Refused) else Committed(one))
            await self._gateway.gate("committed")
        except ServiceError as error:
            told = [error] * len(sessions)
        tell(told)

    async def _commit_each(self, sessions, commits, tell):
        each = [commits.of(at, session) for at, session in enumerate(sessions)]
        tell(await asyncio.gather(*map(self._commit_one, sessions, each)))

    async def _commit_one(self, session, commit):
        async def ask():
            told = asyncio.get_running_loop().create_future()
            self.store.commit_one_soon(session, commit, told.set_result)
            one = await told
            if isinstance(one, Exception):
                raise one
            return one if isinstance(one, Refused) else Committed(one)

        try:
            outcome = await self._commit(session.info.key, commit, ask)
        except ServiceError as error:
            return error
        return outcome.session if isinstance(outcome, Committed) else outcome

    def __getattr__(self, name):
        return getattr(self.store, name)


class Gateway:
    """One gateway, alive until it is crashed."""

    def __init__(self, world, store):
        self.world = world
        self.store = store
        self.tasks = set()
        clock = asyncio.get_running_loop().time
        executor = ChainExecutor(self.gate)
        policy = BatchPolicy(max_batch_size=4, max_steps_per_turn=2, executor_timeout=_FAR)
        self.batcher = Batcher(executor, policy=policy, clock=clock)
        self.engine = Engine(
            store=GatedStore(store, self),
            executor=executor,
            batcher=self.batcher,
            admission=Admission(max_steps=100, max_bytes=10**6),
            clock=clock,
        )

    async def start(self):
        await self.engine.start()
        return self

    def keep(self, task):
        """A task that dies with the gateway."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def begin_single(self, call):
        """As the servicer does it with a step that came by itself; as what ``finish`` takes, None where it is left."""
        over = asyncio.get_running_loop().create_future()
        name = call.key.session_id
        step = self.engine.singles.begin(call, name, None, lambda step, came: over.set_result(came))
        return None if step is None else (step, over)

    def begin(self, calls):
        """Likewise the steps of a message."""
        over = [asyncio.get_running_loop().create_future() for _ in calls]
        begun = [None for _ in calls]

        def ended(steps, places, came):
            for place, one in zip(places, came, strict=True):
                over[place].set_result(one)

        for steps in self.engine.express.begin(alike(calls), None, ended)[0]:
            for place in steps.places:
                begun[place] = (steps, over[place])
        return begun

    def begin_by(self, way, calls):
        if way is Way.EXPRESS:
            return self.begin(calls)
        return [self.begin_single(call) if way is Way.SINGLE else None for call in calls]

    async def finish(self, call, begun):
        """The reply; by the long way where there is no other."""
        if begun is not None:
            steps, over = begun
            try:
                came = await asyncio.shield(over)
            except asyncio.CancelledError:
                steps.cancel(call.key.session_id)
                raise
            if isinstance(came, BaseException):
                raise came
            if came is not None:
                return came
        return await self.engine.step(call)

    async def gate(self, label):
        """Waits until the test lets it go on; returns how."""
        gate = Gate(self, label, asyncio.get_running_loop().create_future())
        self.world.gates.append(gate)
        try:
            return await gate.go_on
        finally:
            self.world.gates.remove(gate)


class Attempt(NamedTuple):
    """One sending of one chunk."""

    gateway: Gateway
    session: "Client"
    chunk: int
    task: asyncio.Task


class Client:
    """One session's user: sends the chunks of its sequence in order, each until it is acknowledged."""

    def __init__(self, name):
        self.key = SessionKey("p", name)
        self._chunks = []
        self._random = np.random.default_rng(list(name.encode()))
        self.acknowledged = 0
        self.sent = 0
        # Chunks that the store had when it was last known to lose writes: it may be behind what was acknowledged.
        self.floor = None

    def chunk(self, number):
        """``[time, 1]``: one to three time steps, no two chunks alike; of all clients those of a number are as long."""
        while len(self._chunks) <= number:
            time = _LENGTHS[len(self._chunks) % len(_LENGTHS)]
            self._chunks.append(self._random.integers(0, 500, (time, 1)).astype(np.float32))
        return self._chunks[number]

    def position(self, number):
        """Where chunk ``number`` begins."""
        return sum(len(self.chunk(n)) for n in range(number))

    def number_at(self, position):
        """Which chunk begins at ``position``; an error where none does."""
        return next(n for n in itertools.count() if self.position(n) >= position)

    def prefix(self, number):
        """Outputs and state after the first ``number`` chunks, undisturbed."""
        if number == 0:
            return np.zeros((0, 4), np.float32), None
        return run_chain(np.concatenate([self.chunk(n) for n in range(number)]))

    def outputs(self, number):
        """What chunk ``number`` gives in the undisturbed run."""
        return self.prefix(number + 1)[0][self.position(number) :]

    def branch(self, number):
        """Sends something else from chunk ``number`` on."""
        del self._chunks[number:]
        self.sent = number

    def replace(self, number):
        """Sends something else, as long, in place of one chunk."""
        self._chunks[number] = self._chunks[number] + 1

    def call(self, number):
        inputs = self.chunk(number)
        digest = digest_of(inputs.tobytes(), *inputs.shape)
        return StepCall(self.key, self.position(number), inputs, digest, asyncio.get_running_loop().time() + _FAR)


class World:
    """Everything there is."""

    def __init__(self, make_store, tally):
        self.make_store = make_store
        self.tally = tally
        self.gates = []
        self.late = []
        self.attempts = []
        self.running = set()
        self.gateways = []

    async def start(self, clients):
        self.gateways = [await Gateway(self, self.make_store()).start() for _ in range(2)]
        self.clients = [Client(name) for name in clients]
        for client in self.clients:
            await self.gateways[0].engine.sessions.create(client.key, "chain", None, 3600.0)
        return self

    def count(self, outcome):
        """What the commits came to, so that a test can tell that it was about something."""
        self.tally["committed" if isinstance(outcome, Committed) else outcome.verdict.value] += 1

    async def run(self, operation):
        """Runs an operation of the store while ``settle`` knows of it."""
        task = asyncio.ensure_future(operation)
        self.running.add(task)
        try:
            return await task
        finally:
            self.running.discard(task)

    async def settle(self):
        """Returns once everything waits at a gate or has ended."""
        quiet = 0  # turns of the loop in a row before which the store had nothing to do
        while quiet < 60:
            if self.running:
                await asyncio.wait(set(self.running))
                quiet = 0
            else:
                await asyncio.sleep(0)
                quiet += 1

    def send(self, client, gateway, number, way=Way.LONG):
        self.send_together([(client, number)], gateway, way)

    def send_together(self, chunks, gateway, way=Way.EXPRESS):
        """Chunks of different clients at once; by the express way, those of as many time steps as one."""
        by_length = {}
        for client, number in chunks:
            client.sent = max(client.sent, number + 1)
            by_length.setdefault(len(client.chunk(number)), []).append((client, number, client.call(number)))
        for equal in by_length.values():
            calls = [call for _, _, call in equal]
            begun = gateway.begin_by(way, calls)
            self.tally["together"] += sum(len(one[0]) > 1 for one in begun if one is not None)
            for (client, number, call), one in zip(equal, begun, strict=True):
                task = asyncio.create_task(gateway.finish(call, one))
                self.attempts.append(Attempt(gateway, client, number, task))

    async def crash(self, place):
        gateway = self.gateways[place]
        for attempt in self.attempts:
            if attempt.gateway is gateway:
                attempt.task.cancel()
        for task in gateway.tasks:
            task.cancel()
        await gateway.batcher.close()
        await self.settle()
        self.gateways[place] = await Gateway(self, self.make_store()).start()

    async def close(self):
        tasks = [attempt.task for attempt in self.attempts]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for gateway in self.gateways:
            for task in gateway.tasks:
                task.cancel()
            await asyncio.gather(*gateway.tasks, return_exceptions=True)
            await gateway.batcher.close()

    async def deliver(self, place):
        """A commit that was given up arrives after all."""
        store, key, commit = self.late.pop(place)
        self.count(await store.commit(key, commit))


def fail(gate, error):
    gate.go_on.set_exception(error)


def unavailable():
    return StoreUnavailable("made to fail")


def unknown():
    return CommitUnknown("made to fail")
