"""Steps without a task of their own: what they come to, when they are not taken, and that they hold on to nothing."""

import asyncio

import numpy as np
import pytest

from service.deadlines import Deadlines
from service.errors import BadModelOutput, DeadlineExceeded, Overloaded, SessionNotFound
from service.types import SessionKey, StepBatchResult
from tests.service.engine_test import KEY, Bench
from tests.service.support import compute, random_inputs, run_whole


class Caller:
    """Begins steps, and waits for them."""

    def __init__(self, bench):
        self._bench = bench
        self.through = asyncio.Queue()

    def begin(self, inputs, position, *, key=KEY, limit=10.0, owner_limit=None):
        call = self._bench.call(inputs, position, key=key, limit=limit)
        return self._bench.engine.express.begin(call, owner_limit, "tag", self.through.put_nowait)

    async def outcome(self):
        return await asyncio.wait_for(self.through.get(), 10)


def nothing_is_held(bench):
    admission, turns = bench.engine._admission, bench.engine._turns
    return (admission.steps, admission.nbytes) == (0, 0) and turns.free(KEY)


async def test_chunks_give_what_the_whole_gives_and_what_the_long_way_goes_on_with():
    async with Bench() as bench:
        caller = Caller(bench)
        await bench.create()
        inputs = random_inputs(20)
        outputs = []
        for begin, end in ((0, 1), (1, 10), (10, 11)):
            step = caller.begin(inputs[begin:end], begin)
            assert step.tag == "tag"
            assert await caller.outcome() is step
            assert (step.error, step.reply.position) == (None, end)
            outputs.append(step.reply.outputs)
        outputs.append((await bench.step(inputs[11:], 11)).outputs)
        np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])
        assert nothing_is_held(bench)


async def test_what_is_out_of_the_ordinary_goes_the_long_way():
    async with Bench(max_steps=1) as bench:
        caller = Caller(bench)
        await bench.create()
        await bench.create(SessionKey("p", "b"))
        inputs = random_inputs(2)
        with pytest.raises(SessionNotFound):
            caller.begin(inputs, 0, key=SessionKey("p", "nobody"))
        assert caller.begin(inputs, 7) is None
        bench.executor.hold()
        caller.begin(inputs, 0)
        assert caller.begin(inputs, 0) is None  # it is being stepped
        with pytest.raises(Overloaded):
            caller.begin(inputs, 0, key=SessionKey("p", "b"))
        bench.executor.gate.set()
        assert (await caller.outcome()).reply.position == 2
        assert caller.begin(inputs, 0) is None  # it is a step sent again
        assert nothing_is_held(bench)


async def test_the_limit_of_an_owner_is_kept_and_given_back():
    async with Bench() as bench:
        caller = Caller(bench)
        other = SessionKey("p", "b")
        await bench.create()
        await bench.create(other)
        bench.executor.hold()
        caller.begin(random_inputs(1), 0, owner_limit=1)
        with pytest.raises(Overloaded):
            caller.begin(random_inputs(1), 0, key=other, owner_limit=1)
        bench.executor.gate.set()
        await caller.outcome()
        assert caller.begin(random_inputs(1), 0, key=other, owner_limit=1) is not None
        await caller.outcome()


async def test_a_step_by_the_long_way_waits_for_the_turn():
    async with Bench() as bench:
        caller = Caller(bench)
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
async def test_a_step_that_is_given_up_is_told_at_once_and_changes_nothing(waits):
    async with Bench() as bench:
        caller = Caller(bench)
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
        assert isinstance(step.error, asyncio.CancelledError)
        bench.executor.gate.set()
        if waits:
            assert (await caller.outcome()).reply.position == 3
        np.testing.assert_array_equal((await bench.step(inputs, 0)).outputs, run_whole(inputs)[0])
        assert nothing_is_held(bench)


async def test_a_step_ends_at_its_time_limit_while_its_batch_runs_on():
    async with Bench() as bench:
        caller = Caller(bench)
        await bench.create()
        bench.executor.hold()
        step = caller.begin(random_inputs(3), 0, limit=0.02)
        assert await caller.outcome() is step
        assert isinstance(step.error, DeadlineExceeded)
        assert step.error.version.model == "sums"
        bench.executor.gate.set()
        assert (await bench.engine.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_a_model_that_fails_is_told_and_changes_nothing():
    async with Bench() as bench:
        caller = Caller(bench)
        await bench.create()
        bench.executor.fault = lambda batch: StepBatchResult(compute(batch).outputs * np.nan, compute(batch).state)
        caller.begin(random_inputs(3), 0)
        assert isinstance((await caller.outcome()).error, BadModelOutput)
        assert (await bench.engine.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_a_session_that_is_another_one_by_the_time_of_the_commit_is_left_to_the_long_way():
    async with Bench() as bench:
        caller = Caller(bench)
        await bench.create()
        inputs = random_inputs(3)
        bench.executor.hold()
        caller.begin(inputs, 0)
        await bench.executor.entered.wait()
        await bench.engine.delete(KEY)
        await bench.create()
        bench.executor.gate.set()
        step = await caller.outcome()
        assert (step.reply, step.error) == (None, None)
        assert (await bench.engine.get(KEY)).position == 0
        assert nothing_is_held(bench)


async def test_a_session_that_is_deleted_meanwhile_is_told():
    async with Bench() as bench:
        caller = Caller(bench)
        await bench.create()
        bench.executor.hold()
        caller.begin(random_inputs(3), 0)
        await bench.executor.entered.wait()
        await bench.engine.delete(KEY)
        bench.executor.gate.set()
        assert isinstance((await caller.outcome()).error, SessionNotFound)
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
