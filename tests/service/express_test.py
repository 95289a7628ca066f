"""Steps without a task of their own: what they come to, when they are not taken, and that they hold on to nothing."""

import asyncio
import gc
import weakref

import numpy as np
import pytest

from service.deadlines import Deadlines
from service.errors import BadModelOutput, DeadlineExceeded, SessionNotFound
from service.types import SessionKey, StepBatchResult
from tests.service.benches import KEY, Bench
from tests.service.support import alike, compute, random_inputs, run_whole


class Step:
    """One step of some that were begun together."""

    def __init__(self):
        self.steps = None
        self.came = None

    def cancel(self):
        self.steps.cancel()


class Caller:
    """Begins steps by the way of many, though each is one, and waits for them."""

    def __init__(self, bench):
        self._bench = bench
        self.through = asyncio.Queue()

    def begin(self, inputs, position, *, key=KEY, limit=10.0, owner_limit=None):
        """The step; None where it is left to the long way."""
        step = Step()
        step.steps = self._begin(self._bench.call(inputs, position, key=key, limit=limit), owner_limit, step)
        return None if step.steps is None else step

    def _begin(self, call, owner_limit, step):
        def ended(steps, places, came):
            assert (steps, list(places)) == (step.steps, [0])
            self._ended(step, *came)

        begun, left = self._bench.engine.express.begin(alike([call]), owner_limit, ended)
        assert len(begun) + len(left) == 1
        return None if left else begun[0]

    def _ended(self, step, came):
        assert not len(step.steps)
        assert not list(step.steps.names())
        step.came = came
        self.through.put_nowait(step)

    async def outcome(self):
        return await asyncio.wait_for(self.through.get(), 10)


class SingleCaller(Caller):
    """Begins them by the way of single steps."""

    def _begin(self, call, owner_limit, step):
        def ended(single, came):
            assert single is step.steps
            self._ended(step, came)

        single = self._bench.engine.singles.begin(call, call.key.session_id, owner_limit, ended)
        assert single is None or list(single.names()) == [call.key.session_id]
        return single


@pytest.fixture(params=[Caller, SingleCaller], ids=["express", "single"])
def caller_of(request):
    return request.param


def nothing_is_held(bench):
    admission, turns = bench.engine._admission, bench.engine._turns
    return (admission.steps, admission.nbytes) == (0, 0) and KEY not in turns.held


async def test_chunks_give_what_the_whole_gives_and_what_the_long_way_goes_on_with(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        await bench.create()
        inputs = random_inputs(20)
        outputs = []
        for begin, end in ((0, 1), (1, 10), (10, 11)):
            step = caller.begin(inputs[begin:end], begin)
            assert await caller.outcome() is step
            assert step.came.position == end
            outputs.append(step.came.outputs)
        outputs.append((await bench.step(inputs[11:], 11)).outputs)
        np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])
        assert nothing_is_held(bench)


async def test_what_is_out_of_the_ordinary_goes_the_long_way(caller_of):
    async with Bench(max_steps=1) as bench:
        caller = caller_of(bench)
        await bench.create()
        await bench.create(SessionKey("p", "b"))
        inputs = random_inputs(2)
        assert caller.begin(inputs, 0, key=SessionKey("p", "nobody")) is None
        assert caller.begin(inputs, 7) is None
        assert caller.begin(inputs[:, :1], 0) is None
        bench.executor.hold()
        caller.begin(inputs, 0)
        assert caller.begin(inputs, 0) is None  # it is being stepped
        assert caller.begin(inputs, 0, key=SessionKey("p", "b")) is None  # there is no room
        bench.executor.gate.set()
        assert (await caller.outcome()).came.position == 2
        assert caller.begin(inputs, 0) is None  # it is a step sent again
        assert nothing_is_held(bench)


async def test_the_limit_of_an_owner_is_kept_and_given_back(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        other = SessionKey("p", "b")
        await bench.create()
        await bench.create(other)
        bench.executor.hold()
        caller.begin(random_inputs(1), 0, owner_limit=1)
        assert caller.begin(random_inputs(1), 0, key=other, owner_limit=1) is None
        bench.executor.gate.set()
        await caller.outcome()
        assert caller.begin(random_inputs(1), 0, key=other, owner_limit=1) is not None
        await caller.outcome()


async def test_a_step_by_the_long_way_waits_for_the_turn(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        await bench.create()
        inputs = random_inputs(6)
        bench.executor.hold()
        caller.begin(inputs[:2], 0)
        behind = asyncio.create_task(bench.step(inputs[2:], 2))
        await bench.executor.entered.wait()
        bench.executor.gate.set()
        np.testing.assert_array_equal((await behind).outputs, run_whole(inputs)[0][2:])
        assert nothing_is_held(bench)


@pytest.mark.parametrize("waits", [False, True], ids=["in a batch", "waiting for one"])
async def test_a_step_that_is_given_up_is_told_at_once_and_changes_nothing(waits, caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        other = SessionKey("p", "b")
        await bench.create()
        await bench.create(other)
        inputs = random_inputs(3)
        bench.executor.hold()
        if waits:
            caller.begin(inputs, 0, key=other)
            await bench.executor.entered.wait()
        step = caller.begin(inputs, 0)
        if not waits:
            await bench.executor.entered.wait()
        step.cancel()
        step.cancel()
        assert await caller.outcome() is step
        assert isinstance(step.came, asyncio.CancelledError)
        bench.executor.gate.set()
        if waits:
            assert (await caller.outcome()).came.position == 3
        np.testing.assert_array_equal((await bench.step(inputs, 0)).outputs, run_whole(inputs)[0])
        assert nothing_is_held(bench)


async def test_what_is_given_up_while_it_runs_is_not_committed(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        other = SessionKey("p", "b")
        await bench.create()
        await bench.create(other)
        bench.executor.hold()
        step = caller.begin(random_inputs(3), 0)
        caller.begin(random_inputs(3), 0, key=other)
        await bench.executor.entered.wait()
        step.cancel()
        assert await caller.outcome() is step
        bench.executor.gate.set()
        assert (await caller.outcome()).came.position == 3
        assert (await bench.engine.sessions.get(KEY)).position == 0


async def test_a_step_ends_at_its_time_limit_while_its_batch_runs_on(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        await bench.create()
        bench.executor.hold()
        step = caller.begin(random_inputs(3), 0, limit=0.02)
        assert await caller.outcome() is step
        assert isinstance(step.came, DeadlineExceeded)
        assert step.came.version.model == "sums"
        bench.executor.gate.set()
        assert (await bench.engine.sessions.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_a_model_that_fails_is_told_and_changes_nothing(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        await bench.create()
        bench.executor.fault = lambda batch: StepBatchResult(compute(batch).outputs * np.nan, compute(batch).state)
        caller.begin(random_inputs(3), 0)
        assert isinstance((await caller.outcome()).came, BadModelOutput)
        assert (await bench.engine.sessions.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_a_session_that_is_another_one_by_the_time_of_the_commit_is_left_to_the_long_way(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        await bench.create()
        inputs = random_inputs(3)
        bench.executor.hold()
        caller.begin(inputs, 0)
        await bench.executor.entered.wait()
        await bench.engine.sessions.delete(KEY)
        await bench.create()
        bench.executor.gate.set()
        step = await caller.outcome()
        assert step.came is None
        assert (await bench.engine.sessions.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_a_session_that_is_deleted_meanwhile_is_told(caller_of):
    async with Bench() as bench:
        caller = caller_of(bench)
        await bench.create()
        bench.executor.hold()
        caller.begin(random_inputs(3), 0)
        await bench.executor.entered.wait()
        await bench.engine.sessions.delete(KEY)
        bench.executor.gate.set()
        assert isinstance((await caller.outcome()).came, SessionNotFound)
        assert nothing_is_held(bench)


class Together:
    """Begins the steps of some sessions at once, and notes what each of them came to."""

    def __init__(self, bench, names):
        self._bench = bench
        self.keys = [SessionKey(KEY.principal, name) for name in names]
        self.inputs = [random_inputs(3, seed) for seed in range(len(names))]
        self.came = {}
        self.over = asyncio.Event()

    async def create(self):
        for key in self.keys:
            await self._bench.create(key)

    def begin(self, positions=None):
        positions = positions or [0] * len(self.keys)
        calls = [
            self._bench.call(inputs, position, key=key)
            for key, inputs, position in zip(self.keys, self.inputs, positions, strict=True)
        ]
        return self._bench.engine.express.begin(alike(calls), None, self._ended)

    def _ended(self, steps, places, came):
        for place, one in zip(places, came, strict=True):
            assert place not in self.came
            self.came[place] = one
        if not len(steps):
            self.over.set()

    def check(self, places):
        for place in places:
            np.testing.assert_array_equal(self.came[place].outputs, run_whole(self.inputs[place])[0])


async def test_steps_of_many_sessions_go_together_and_what_is_out_of_the_ordinary_is_left():
    async with Bench() as bench:
        together = Together(bench, "bcdefghij")  # more than a batch takes
        await together.create()
        (steps,), left = together.begin([0, 0, 5, 0, 0, 0, 0, 0, 0])
        assert (left, len(steps), bench.engine._admission.steps) == ([2], 8, 8)
        assert together.begin()[0][0].places == [2]  # all others are being stepped
        await asyncio.wait_for(together.over.wait(), 10)
        together.check({0, 1, 3, 4, 5, 6, 7, 8})
        assert nothing_is_held(bench)


async def test_of_steps_that_go_together_one_may_be_given_up_and_one_fail():
    async with Bench() as bench:
        together = Together(bench, "bcd")
        await together.create()
        bench.executor.hold()
        (steps,), _ = together.begin()
        await bench.executor.entered.wait()
        assert sorted(steps.names()) == ["b", "c", "d"]
        steps.cancel("c")
        steps.cancel("c")
        steps.cancel("nobody")
        assert (list(together.came), len(steps)) == ([1], 2)
        assert isinstance(together.came[1], asyncio.CancelledError)
        await bench.engine.sessions.delete(together.keys[2])
        bench.executor.gate.set()
        await asyncio.wait_for(together.over.wait(), 10)
        together.check([0])
        assert isinstance(together.came[2], SessionNotFound)
        assert (await bench.engine.sessions.get(together.keys[1])).position == 0
        assert nothing_is_held(bench)


async def test_what_is_through_is_let_go_without_the_garbage_collector():
    async with Bench() as bench:
        together = Together(bench, "bcd")
        await together.create()
        gc.collect()
        gc.disable()
        try:
            (steps,), _ = together.begin()
            gone = weakref.ref(steps.calls.inputs)
            del steps
            await asyncio.wait_for(together.over.wait(), 10)
            await bench.create()
            await bench.step(random_inputs(1), 0)  # the last batch of all is kept until there is another
            assert gone() is None
        finally:
            gc.enable()


async def test_a_single_step_that_is_through_is_let_go_without_the_garbage_collector():
    async with Bench() as bench:
        over = asyncio.Event()
        await bench.create()
        gc.collect()
        gc.disable()
        try:
            step = bench.engine.singles.begin(bench.call(random_inputs(1), 0), "a", None, lambda *_: over.set())
            gone = weakref.ref(step.call.inputs)
            del step
            await asyncio.wait_for(over.wait(), 10)
            await bench.step(random_inputs(1), 1)  # the last batch of all is kept until there is another
            assert gone() is None
        finally:
            gc.enable()


async def test_a_single_step_is_cancelled_by_its_own_name_alone():
    async with Bench() as bench:
        caller = SingleCaller(bench)
        await bench.create()
        bench.executor.hold()
        step = caller.begin(random_inputs(1), 0)
        step.steps.cancel("somebody")
        assert len(step.steps) == 1
        step.steps.cancel("a")
        assert isinstance((await caller.outcome()).came, asyncio.CancelledError)
        bench.executor.gate.set()
        assert (await bench.engine.sessions.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_steps_for_which_there_is_no_room_together_are_all_left():
    async with Bench(max_steps=2) as bench:
        together = Together(bench, "bcd")
        await together.create()
        assert together.begin() == ([], [0, 1, 2])
        assert nothing_is_held(bench)
        assert bench.engine._turns.held.isdisjoint(together.keys)


async def test_a_model_that_fails_on_one_of_them_fails_that_alone():
    async with Bench() as bench:
        together = Together(bench, "bcdef")
        await together.create()

        def fault(batch):
            result = compute(batch)
            poisoned = (batch.inputs[:, 0] == together.inputs[3][0]).all(axis=1)
            result.state[poisoned] = np.inf
            return result

        bench.executor.fault = fault
        together.begin()
        await asyncio.wait_for(together.over.wait(), 10)
        together.check([0, 1, 2, 4])
        assert isinstance(together.came[3], BadModelOutput)
        assert nothing_is_held(bench)


class Timers:
    """An event loop's timers, moved by hand."""

    def __init__(self):
        self.set = []

    def call_at(self, when, callback, *args):
        self.set.append((when, callback, args))

    def pass_to(self, now):
        due, self.set = [t for t in self.set if t[0] <= now], [t for t in self.set if t[0] > now]
        for _, callback, args in due:
            callback(*args)


class Expiring:
    expired = 0

    def expire(self):
        self.expired += 1


def test_deadlines_ring_for_what_is_left_once_and_never_early():
    timers = Timers()
    deadlines = Deadlines(timers.call_at)
    early, late, through = Expiring(), Expiring(), Expiring()
    for step, deadline in ((early, 1.001), (late, 2.0), (through, 1.002)):
        tick = deadlines.add(step, deadline)
        if step is through:
            deadlines.discard(step, tick)
            deadlines.discard(step, tick)
    assert len(timers.set) == 2  # one for the two that end together
    timers.pass_to(1.0)
    assert (early.expired, late.expired) == (0, 0)
    timers.pass_to(1.02)
    assert (early.expired, late.expired) == (1, 0)
    timers.pass_to(3.0)
    assert (early.expired, late.expired, through.expired) == (1, 1, 0)
