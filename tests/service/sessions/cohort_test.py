"""A store that keeps sessions together does what one does that keeps each by itself."""

import asyncio
import gc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.digests import Digests
from service.errors import ServiceError, SessionNotFound
from service.sessions import Commit, Committed, Refused, Session, SessionInfo
from service.sessions import cohort as keeping
from service.sessions.cohort import Cohort, Commits, Replies
from service.sessions.memory import MemoryStore
from service.types import SessionKey, StepReply, VersionKey

NAMES = "abcdef"
STATE, WIDTH = 64, 2


@pytest.fixture(scope="module", autouse=True)
def _states_are_kept_however_small():
    """Those of these tests are."""
    before, keeping.LEAST_KEPT_BYTES = keeping.LEAST_KEPT_BYTES, 0
    yield
    keeping.LEAST_KEPT_BYTES = before


def key_of(name):
    return SessionKey("p", name)


def info_of(name, ttl=60.0, version=1):
    return SessionInfo(key_of(name), VersionKey("m", version), f"f{version}", ttl, b"request", 0.0)


def steps_of(seed, names, time, *, native=None):
    """What a batch made of one step of each, which depends on nothing but its name."""
    draws = [np.random.default_rng([seed, *name.encode()]) for name in names]
    inputs = np.stack([draw.random((time, WIDTH), np.float32) for draw in draws])
    outputs = np.stack([draw.random((time, 3), np.float32) for draw in draws])
    states = np.stack([draw.random(STATE, np.float32) for draw in draws])
    return Commits([None] * len(names), Digests(inputs), outputs, states, native)


def seen(session):
    """All that there is to a session but its token, which is drawn."""
    if session is None:
        return None
    last = session.last and (session.last.begin, session.last.digest, *seen_reply(session.last.reply))
    state = None if session.state is None else session.state.tolist()
    return (*session[:2], state, last, session.last_used, session.expires)


def seen_reply(reply):
    return reply.position, reply.outputs.tolist()


class World:
    """One store, and what is done to it. Of two that differ in nothing else, everything that is seen is compared."""

    def __init__(self, large_cohort):
        self.now = 1000.0
        self.cohorts = 0
        self.store = MemoryStore(max_sessions=5, clock=lambda: self.now, large_cohort=large_cohort or 1)
        if large_cohort is None:
            self.store._stay_together = lambda sessions: False
        # What a gateway holds from before: sessions that a step under way runs on.
        self.held = {}

    async def create(self, name, ttl, version):
        return seen(await self.store.create(info_of(name, ttl, version)))

    async def load(self, name):
        session = await self.store.load(key_of(name))
        self.held[name] = session
        return seen(session)

    async def extend(self, name, seconds):
        await self.store.extend(key_of(name), seconds)

    async def delete(self, name):
        await self.store.delete(key_of(name))

    async def elapse(self, seconds):
        self.now += seconds

    async def sweep(self):
        return sorted(await self.store.sweep())

    async def counts(self):
        return await self.store.counts()

    async def look(self, limit):
        return await self.store.list_sessions("p", after="a", limit=limit)

    async def step_alone(self, name, seed, position):
        session = self.held.get(name)
        if session is None:
            return None
        commit = steps_of(seed, [name], 1).of(0, session)._replace(position=position)
        return seen_outcome(await self.store.commit(key_of(name), commit))

    async def step_together(self, names, seed, time, lost, between):
        """As ``Express`` does it; of those that are ``lost`` somebody gave the step up meanwhile."""
        ids, parts, rest = list(names), [], list(names)
        for place, cohort in self.store.cohorts_now("p", ids, 5.0):
            self.cohorts += 1
            its = ids[place : place + len(cohort)]
            assert [key.session_id for key in cohort.keys] == its
            parts.append((its, cohort))
            rest = [name for name in rest if name not in its]
        found = self.store.extend_now(self.store.load_now([key_of(name) for name in rest]), 5.0)
        alone = {name: session for name, session in zip(rest, found, strict=True) if session is not None}
        for version in (1, 2):
            its = [name for name in alone if alone[name].info.version.version == version]
            parts.append((its, [alone[name] for name in its]))
        before = await self.do(*between) if between else None
        told = {}
        for its, sessions in parts:
            rows = [row for row, name in enumerate(its) if name not in lost]
            if rows:
                native = "native" if len(rows) == len(its) else None
                steps = steps_of(seed, [its[row] for row in rows], time, native=native)
                answers = []
                ran_on = sessions if native else [sessions[row] for row in rows]
                self.store.commit_soon(ran_on, steps, answers.append)
                told.update(zip([its[row] for row in rows], answers[0], strict=True))
            self.held.update(zip(its, sessions, strict=True))
        return before, {name: seen_outcome(one) for name, one in sorted(told.items())}

    async def do(self, name, arguments):
        try:
            return await getattr(self, name)(*arguments)
        except ServiceError as error:
            return type(error)

    async def all(self):
        return [(name, seen(await self.found(name))) for name in NAMES]

    async def found(self, name):
        try:
            return await self.store.load(key_of(name))
        except SessionNotFound:
            return None


def seen_outcome(outcome):
    if isinstance(outcome, Refused):
        return outcome.verdict, seen(outcome.session)
    if isinstance(outcome, Exception):
        return type(outcome)
    return seen(outcome.session if isinstance(outcome, Committed) else outcome)


class Call(NamedTuple):
    """Something that is done."""

    name: str
    arguments: tuple


def call(name, *arguments):
    return st.tuples(*arguments).map(lambda drawn: Call(name, drawn))


names = st.sampled_from(NAMES)
seeds = st.integers(0, 1000)
# Mostly the same again.
together = st.just(list(NAMES[:4])) | st.permutations(NAMES).flatmap(
    lambda order: st.integers(2, len(NAMES)).map(lambda size: order[:size])
)
others = (
    call("create", names, st.sampled_from((60.0, 60.0, 8.0)), st.sampled_from((1, 1, 1, 2)))
    | call("load", names)
    | call("step_alone", names, seeds, st.none() | st.integers(0, 3))
    | call("extend", names, st.sampled_from((1.0, 100.0)))
    | call("delete", names)
    | call("sweep")
    | call("counts")
    | call("look", st.integers(1, 4))
)
elapse = call("elapse", st.sampled_from((1.0, 4.0, 9.0, 9.0, 40.0, 70.0)))
lost = st.just(frozenset()) | st.sets(names, max_size=1)
steps = call("step_together", together, seeds, st.integers(1, 2), lost, st.none() | others | elapse)
# Half of what is done are steps.
calls = st.lists(st.booleans().flatmap(lambda step: steps if step else others | elapse), min_size=15, max_size=40)


async def run(large_cohort, done):
    world = World(large_cohort)
    history = []
    for name in NAMES[:5]:
        await world.create(name, 8.0 if name in "be" else 60.0, 1)
    for name, arguments in done:
        history.append((name, await world.do(name, arguments)))
    history.append(await world.all())
    return world, history


@settings(max_examples=400, deadline=None)
@given(calls, st.sampled_from((2, 2, 4, 16)))
def test_cohorts_are_the_sessions_that_they_stand_for(done, large_cohort):
    _, expected = asyncio.run(run(None, done))
    _, came = asyncio.run(run(large_cohort, done))
    assert came == expected


@pytest.mark.parametrize(("large_cohort", "cohorts"), [(None, 0), (2, 3), (16, 2)])
def test_the_property_above_is_about_cohorts(large_cohort, cohorts):
    step = Call("step_together", (list("abcd"), 1, 1, frozenset(), None))
    world, _ = asyncio.run(run(large_cohort, [step] * 4))
    assert world.cohorts == cohorts


@pytest.mark.parametrize("look", ["counts", "sweep"])
async def test_some_of_a_cohort_expire_before_the_others(look):
    world = World(2)
    for name, ttl in (("a", 60.0), ("b", 8.0), ("c", 60.0)):
        await world.create(name, ttl, 1)
    step(world.store, "abc", steps_of(0, "abc", 1))
    world.now += 9
    if look == "counts":
        assert await world.counts() == {VersionKey("m", 1): 2}
    else:
        assert await world.sweep() == [key_of("b")]
    assert [seen(await world.found(name)) is not None for name in "abc"] == [True, False, True]


@pytest.fixture
async def store():
    store = MemoryStore(max_sessions=10, clock=lambda: 1000.0, large_cohort=2)
    for name in NAMES[:3]:
        await store.create(info_of(name))
    return store


def step(store, names, commits):
    """Writes a step of each; returns what is told of it."""
    ((_, sessions),) = store.cohorts_now("p", list(names), 1.0) or [(0, None)]
    told = []
    if sessions is None:
        sessions = store.load_now([key_of(name) for name in names])
    store.commit_soon(sessions, commits, told.append)
    return told[0]


async def test_a_small_company_is_kept_together_once_it_comes_again():
    store = MemoryStore(max_sessions=10, clock=lambda: 1000.0)
    for name in NAMES:
        await store.create(info_of(name))

    def kept(names, seed):
        return isinstance(step(store, names, steps_of(seed, names, 1)), Cohort)

    assert [kept("abc", seed) for seed in range(4)] == [False, True, True, True]
    assert [kept("d", seed) for seed in range(3)] == [False, True, True]  # alone is a company too
    assert [kept("ef", 0), kept("e", 1), kept("ef", 2), kept("fe", 3)] == [False] * 4
    # Among others each goes by itself: it would take rows of its own.
    assert store.cohorts_now("p", list("abcd"), 1.0) == []
    assert not kept("abcd", 5)


@pytest.mark.parametrize("end", ["delete", "expire", "close"])
async def test_companies_are_forgotten_with_their_sessions(end):
    world = World(16)
    for name in "ab":
        await world.create(name, 60.0, 1)
    await world.step_together("ab", 0, 1, (), None)
    assert len(world.store._companies) == 1
    if end == "close":
        await world.store.close()
    elif end == "delete":
        await world.delete("a")
    else:
        world.now += 70
        await world.sweep()
    assert not world.store._companies


async def test_states_that_are_all_of_a_result_are_kept_as_they_are(store):
    for seed in range(3):
        steps = steps_of(seed, "abc", 1, native=object())
        kept = step(store, "abc", steps)
        assert kept.states is steps.states
        assert kept.native is steps.native


async def test_small_states_are_copied(store, monkeypatch):
    steps = steps_of(0, "abc", 1, native=object())
    monkeypatch.setattr(keeping, "LEAST_KEPT_BYTES", steps.states.nbytes + 1)
    kept = step(store, "abc", steps)
    assert not np.shares_memory(kept.states, steps.states)
    assert kept.native is None


async def test_a_part_of_a_result_does_not_hold_on_to_the_whole(store):
    whole = steps_of(0, "abcdef", 1)
    part = Commits([None] * 3, whole.digests[1:4], whole.outputs[1:4], whole.states[1:4], "native")
    cohort = step(store, "abc", part)
    np.testing.assert_array_equal(cohort.states, whole.states[1:4])
    assert not np.shares_memory(cohort.states, whole.states)
    assert not np.shares_memory(cohort.replies.outputs, whole.outputs)
    assert cohort.native is None  # it is of the whole


async def test_a_session_by_itself_does_not_hold_on_to_the_others(store):
    cohort = step(store, "abc", steps_of(0, "abc", 1))
    session = await store.load(key_of("b"))
    assert not np.shares_memory(session.state, cohort.states)
    assert not np.shares_memory(session.last.reply.outputs, cohort.replies.outputs)
    assert isinstance(store._sessions[key_of("b")], Cohort)  # looking changes nothing
    await store.delete(key_of("b"))
    assert [type(store._sessions[key_of(name)]) for name in "ac"] == [Session, Session]


async def test_what_was_is_let_go(store):
    step(store, "abc", steps_of(0, "abc", 1))
    step(store, "abc", steps_of(1, "abc", 1))
    gc.collect()
    kept = {id(one) for one in gc.get_objects() if isinstance(one, Cohort)}
    assert kept <= {id(store._sessions[key_of("a")])}


@pytest.mark.parametrize("time", [1, 500], ids=["short inputs", "long inputs"])
async def test_digests_are_those_of_the_steps_whether_or_not_they_are_found_at_once(store, time):
    steps = steps_of(0, "abc", time)
    expected = list(steps.digests)
    cohort = step(store, "abc", steps)
    assert [session.last.digest for session in cohort] == expected
    assert isinstance(cohort._digests, Digests) == (time == 1)
    # The inputs may be a view of a whole message.
    assert time > 1 or not np.shares_memory(cohort._digests._inputs, steps.digests._inputs)


async def test_a_commit_on_what_has_moved_on_is_refused_for_each(store):
    cohort = step(store, "abc", steps_of(0, "abc", 1))
    step(store, "abc", steps_of(1, "abc", 1))
    told = []
    store.commit_soon(cohort, steps_of(2, "abc", 1), told.append)
    assert [type(one) for one in told[0]] == [Refused] * 3
    assert [session.position for session in store.load_now([key_of(name) for name in "abc"])] == [2, 2, 2]


async def test_where_one_session_has_moved_on_only_the_others_are_written(store):
    sessions = store.load_now([key_of(name) for name in "abc"])
    await store.commit(key_of("b"), steps_of(0, "b", 1).of(0, sessions[1]))
    told = []
    store.commit_soon(sessions, steps_of(1, "abc", 2), told.append)
    assert [type(one) for one in told[0]] == [Session, Refused, Session]
    assert [session.position for session in store.load_now([key_of(name) for name in "abc"])] == [2, 1, 2]


async def test_tokens_are_of_one_commit_and_of_one_session(store):
    tokens = set()
    for seed in range(4):
        tokens.update(session.token for session in step(store, "abc", steps_of(seed, "abc", 1)))
    assert len(tokens) == 12
    assert {len(token) for token in tokens} == {16}
    cohort = store._sessions[key_of("a")]
    assert [session.token for session in cohort] == [(await store.load(key_of(name))).token for name in "abc"]


async def test_a_commit_by_itself_is_written_on_the_token_of_a_cohorts_session(store):
    step(store, "abc", steps_of(0, "abc", 1))
    session = await store.load(key_of("b"))
    commit = Commit(session.token, 1, 1, b"d" * 32, session.state, StepReply(2, np.zeros((1, 3), np.float32)))
    assert isinstance(await store.commit(key_of("b"), commit), Committed)
    assert isinstance(await store.commit(key_of("b"), commit), Refused)


def test_replies_are_columns_and_rows():
    replies = [StepReply(n, np.full((2, 3), n, np.float32)) for n in range(4)]
    columns = Replies.of(replies)
    assert (list(columns.positions), columns.outputs.shape) == ([0, 1, 2, 3], (4, 2, 3))
    for rows in (list(columns), [*columns[:1], *columns[1:]]):
        assert list(map(seen_reply, rows)) == list(map(seen_reply, replies))
