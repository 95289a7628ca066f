"""Sessions that are stepped together through the engine: whoever steps with whom, each gets what it would get alone."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.errors import Overloaded
from service.sessions import cohort as keeping
from service.sessions.cohort import Cohort
from service.sessions.memory import MemoryStore
from service.types import SessionKey
from tests.service.benches import Bench, Clock
from tests.service.support import NumpyExecutor, alike, random_inputs, run_whole

NAMES = "abcdef"


@pytest.fixture(scope="module", autouse=True)
def _states_are_kept_however_small():
    """Those of these tests are."""
    before, keeping.LEAST_KEPT_BYTES = keeping.LEAST_KEPT_BYTES, 0
    yield
    keeping.LEAST_KEPT_BYTES = before


def key_of(name):
    return SessionKey("p", name)


class NativeExecutor(NumpyExecutor):
    """Answers the states with a token besides, as an executor does that can use them as they are."""

    def __init__(self):
        super().__init__()
        self.native = 0

    async def step(self, key, batch):
        if batch.native is not None:
            self.native += 1
            np.testing.assert_array_equal(batch.native, batch.state)
            assert not batch.reset.any()
        before = batch.state.copy()
        result = await super().step(key, batch)
        np.testing.assert_array_equal(batch.state, before)
        result.state.setflags(write=False)  # what is kept may be read by the next batch at any time
        return result._replace(native=result.state.copy())


class Sessions:
    """Sessions of an engine that keeps two of them together already, and what each has been stepped with."""

    def __init__(self, max_steps=100):
        store = MemoryStore(max_sessions=10, clock=Clock(), large_cohort=2)
        self.bench = Bench(NativeExecutor(), store=store, max_steps=max_steps)
        self.inputs = {name: random_inputs(0) for name in NAMES}
        self.random = np.random.default_rng(0)
        self.cohorts = 0

    async def __aenter__(self):
        await self.bench.__aenter__()
        for name in NAMES:
            await self.bench.create(key_of(name))
        return self

    async def __aexit__(self, *error):
        admission, turns = self.bench.engine._admission, self.bench.engine._turns
        assert (admission.steps, admission.nbytes, len(turns.held)) == (0, 0, 0)
        await self.bench.__aexit__(*error)

    def calls_of(self, names, time, *, says=True):
        inputs = self.random.integers(-9, 9, (len(names), time, 2)).astype(np.float32)
        return [
            self.bench.call(mine, len(self.inputs[name]) if says else None, key=key_of(name))
            for name, mine in zip(names, inputs, strict=True)
        ]

    def begin(self, calls):
        """As the servicer does with a message; the future of each."""
        over = [asyncio.get_running_loop().create_future() for _ in calls]

        def ended(steps, places, came):
            for place, one in zip(places, came, strict=True):
                over[place].set_result(one)

        begun, left = self.bench.engine.express.begin(alike(calls), None, ended)
        self.cohorts += sum(isinstance(steps.sessions, Cohort) for steps in begun)
        for place in left:
            over[place].set_result(None)
        return begun, over

    async def message(self, names, time, *, says=True, lost=None, twice=False):
        """Steps some of them together; what is left goes the long way, and what is lost is sent again."""
        calls = self.calls_of(names, time, says=says)
        begun, over = self.begin(calls)
        again = self.begin(calls)[1] if twice and says else []
        for steps in begun:
            if lost in steps.names():
                steps.cancel(lost)
        for sent in (over, again):
            for call, future in zip(calls, sent, strict=bool(sent)):
                came = await future
                if isinstance(came, asyncio.CancelledError) and not says:
                    await self.settle(call)
                    continue
                if came is None or isinstance(came, asyncio.CancelledError):
                    came = await self.bench.engine.step(call)
                self.check(call, came, applied=sent is over)

    async def settle(self, call):
        """It was given up, and did not say its position: it may have been applied."""
        session = await self.bench.store.load(call.key)
        name = call.key.session_id
        if session.position > len(self.inputs[name]):
            self.inputs[name] = np.concatenate([self.inputs[name], call.inputs])
        assert session.position == len(self.inputs[name])

    def check(self, call, reply, *, applied):
        name = call.key.session_id
        if applied:
            self.inputs[name] = np.concatenate([self.inputs[name], call.inputs])
        whole = self.inputs[name]
        assert reply.position == len(whole)
        np.testing.assert_array_equal(reply.outputs, run_whole(whole)[0][-len(call.inputs) :])

    async def alone(self, name, time):
        (call,) = self.calls_of([name], time)
        self.check(call, await self.bench.engine.step(call), applied=True)
        self.check(call, await self.bench.engine.step(call), applied=False)  # a replay

    async def anew(self, name):
        await self.bench.engine.sessions.delete(key_of(name))
        await self.bench.create(key_of(name))
        self.inputs[name] = random_inputs(0)

    async def look(self, name):
        session = await self.bench.engine.sessions.get(key_of(name))
        assert session.position == len(self.inputs[name])
        if session.position:
            np.testing.assert_array_equal(session.state, run_whole(self.inputs[name])[1])


names = st.sampled_from(NAMES)
several = st.just(list(NAMES[:4])) | st.permutations(NAMES).flatmap(
    lambda order: st.integers(1, len(NAMES)).map(lambda size: order[:size])
)
messages = st.tuples(
    st.just("message"),
    st.tuples(several, st.integers(1, 6)),
    st.fixed_dictionaries({"says": st.booleans(), "lost": st.none() | names, "twice": st.booleans()}),
)
others = (
    st.tuples(st.just("alone"), st.tuples(names, st.integers(1, 2)), st.just({}))
    | st.tuples(st.just("anew"), st.tuples(names), st.just({}))
    | st.tuples(st.just("look"), st.tuples(names), st.just({}))
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans().flatmap(lambda message: messages if message else others), max_size=20))
def test_whoever_steps_with_whom_gets_what_it_would_get_alone(done):
    async def run():
        async with Sessions() as sessions:
            for name, arguments, options in done:
                await getattr(sessions, name)(*arguments, **options)
            for name in NAMES:
                await sessions.look(name)

    asyncio.run(run())


async def test_the_same_again_is_one_value_and_its_states_are_not_copied():
    async with Sessions() as sessions:
        for _ in range(4):
            await sessions.message(list("abcd"), 2)
        assert sessions.cohorts == 3
        assert sessions.bench.executor.native == 3
        await sessions.message(list("fabcde"), 1)  # among others as well
        assert sessions.cohorts == 4
        await sessions.message(list("dcba"), 1)  # in another order they are not the same
        assert sessions.cohorts == 4
        await sessions.message(list("dcba"), 1, says=False)
        assert sessions.cohorts == 5


async def test_chunks_of_several_turns_go_on_from_the_states_as_they_are():
    async with Sessions() as sessions:
        await sessions.message(list("abcd"), 1)
        await sessions.message(list("abcd"), 11)  # four time steps a turn
        assert sessions.bench.executor.native == 3
        await sessions.message(list("abcd"), 1)


async def test_one_that_is_given_up_leaves_the_others_theirs():
    async with Sessions() as sessions:
        await sessions.message(list("abcd"), 1)
        sessions.bench.executor.hold()
        calls = sessions.calls_of(list("abcd"), 1)
        (steps,), over = sessions.begin(calls)
        await sessions.bench.executor.entered.wait()
        steps.cancel("b")
        sessions.bench.executor.gate.set()
        came = await asyncio.gather(*over)
        assert isinstance(came[1], asyncio.CancelledError)
        for place in (0, 2, 3):
            sessions.check(calls[place], came[place], applied=True)
        await sessions.look("b")
        await sessions.message(list("abcd"), 1)


async def test_a_cohort_that_is_being_stepped_is_not_begun_again():
    async with Sessions() as sessions:
        await sessions.message(list("abcd"), 1)
        sessions.bench.executor.hold()
        calls = sessions.calls_of(list("abcd"), 1)
        _, over = sessions.begin(calls)
        begun, again = sessions.begin(calls)
        assert not begun
        assert [future.result() for future in again] == [None] * 4
        sessions.bench.executor.gate.set()
        for call, future in zip(calls, over, strict=True):
            sessions.check(call, await future, applied=True)


@pytest.mark.parametrize("fault", ["raises", "NaN in one"])
async def test_a_batch_that_fails_leaves_its_cohort_as_it_was(fault):
    async with Sessions() as sessions:
        await sessions.message(list("abcd"), 1)
        before = sessions.bench.store._sessions[key_of("a")]
        assert isinstance(before, Cohort)

        def fail(batch):
            raise RuntimeError("made to fail")

        def poison(batch):
            batch.inputs[0] = np.nan

        sessions.bench.executor.fault = fail if fault == "raises" else poison
        calls = sessions.calls_of(list("abcd"), 1)
        came = await asyncio.gather(*sessions.begin(calls)[1])
        assert isinstance(came[0], Exception)
        sessions.bench.executor.fault = None
        if fault == "raises":
            assert sessions.bench.store._sessions[key_of("a")] is before
        for call, one in zip(calls, came, strict=True):
            reply = await sessions.bench.engine.step(call) if isinstance(one, Exception) else one
            sessions.check(call, reply, applied=True)


async def test_where_there_is_no_room_for_a_cohort_none_of_it_is_begun():
    async with Sessions(max_steps=4) as sessions:
        await sessions.message(list("ab"), 1)
        sessions.bench.executor.hold()
        held = sessions.calls_of(list("cde"), 1)
        _, over = sessions.begin(held)
        calls = sessions.calls_of(list("ab"), 1)
        begun, _ = sessions.begin(calls)
        assert not begun
        sessions.bench.executor.gate.set()
        for call, future in zip(held, over, strict=True):
            sessions.check(call, await future or await sessions.bench.engine.step(call), applied=True)
        with pytest.raises(Overloaded):
            sessions.bench.engine._admission.take(0, "", None, 5)
        await sessions.message(list("ab"), 1)
