"""A single step that finds nothing before it and has no company to wait for: it is begun at once."""

import asyncio

import numpy as np
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.batcher import Batcher, BatchPolicy
from service.errors import BadModelOutput, DeadlineExceeded, ExecutorUnavailable
from service.observing import Observer
from service.step_stream import StepStream, answer_of
from service.types import SessionKey, StepReply
from tests.service.batching import NEVER, Clock, settle, submit
from tests.service.benches import KEY, Bench
from tests.service.short_chunks_test import until_the_next
from tests.service.support import NumpyExecutor, compute, random_inputs, run_whole, version_of

OTHER = SessionKey("p", "b")


class HereAndNow(NumpyExecutor):
    """Runs batches before ``begin`` returns, unless it is held."""

    ahead = 0

    def begin(self, key, batch, *, company=False):
        if not self.gate.is_set():
            return asyncio.ensure_future(self.step(key, batch))
        self.batches.append(batch)
        running = asyncio.get_running_loop().create_future()
        try:
            running.set_result((self.fault or compute)(batch))
        except ExecutorUnavailable as error:
            running.set_exception(error)
        return running


class Steps:
    """Begins single steps, and keeps what came of each."""

    def __init__(self, bench):
        self._bench = bench
        self.came = {}
        self.through = asyncio.Event()  # one of them, since it was cleared

    def begin(self, inputs, position, *, key=KEY, limit=10.0):
        call = self._bench.call(inputs, position, key=key, limit=limit)

        def ended(step, came):
            assert not len(step)
            self.came[key, position] = came
            self.through.set()

        return self._bench.engine.singles.begin(call, key.session_id, None, ended)

    async def outcome(self, position, *, key=KEY):
        await settle()
        return self.came[key, position]

    def held(self):
        """What steps hold that are not through."""
        engine = self._bench.engine
        deadlines = [step for tick in engine.singles._deadlines._ticks.values() for step in tick]
        return (engine._admission.steps, engine._admission.nbytes, len(engine._turns.held), len(deadlines))


@pytest.fixture
async def bench():
    async with Bench(HereAndNow()) as bench:
        for key in (KEY, OTHER):
            await bench.create(key)
        yield bench


@pytest.fixture
def steps(bench):
    return Steps(bench)


async def test_the_next_step_of_who_stepped_last_is_through_at_once(bench, steps):
    inputs = random_inputs(12)
    steps.begin(inputs[:4], 0)
    assert not steps.came  # another might have come with it
    outputs = [(await steps.outcome(0)).outputs]
    for position in (4, 5, 8):  # a chunk of four time steps is the longest that one turn finishes
        step = steps.begin(inputs[position : {4: 5, 5: 8, 8: 12}[position]], position)
        assert step.over
        assert steps.held() == (0, 0, 0, 0)
        outputs.append(steps.came[KEY, position].outputs)
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])
    assert len(bench.executor.batches) == 4
    assert (await bench.engine.sessions.get(KEY)).position == 12


async def test_steps_of_several_share_their_batches(bench, steps):
    for position in range(3):
        for key in (KEY, OTHER):
            steps.begin(random_inputs(1, position), position, key=key)
        assert isinstance(await steps.outcome(position), StepReply)
        assert isinstance(await steps.outcome(position, key=OTHER), StepReply)
    assert [batch.inputs.shape[0] for batch in bench.executor.batches] == [2, 2, 2]


async def test_what_waits_or_runs_is_not_overtaken(bench, steps):
    for key in (OTHER, KEY):
        steps.begin(random_inputs(1), 0, key=key)
        await settle()
    bench.executor.hold()
    running = asyncio.ensure_future(bench.step(random_inputs(2), 1, key=OTHER))
    await bench.executor.entered.wait()
    assert not steps.begin(random_inputs(1), 1).over
    await settle()
    assert len(bench.executor.batches) == 3
    bench.executor.gate.set()
    await running
    assert (await steps.outcome(1)).position == 2
    waiting = asyncio.ensure_future(bench.step(random_inputs(2), 3, key=OTHER))
    await asyncio.sleep(0)  # it is in the queue, from which it is taken soon
    assert not steps.begin(random_inputs(1), 2).over
    await waiting
    assert (await steps.outcome(2)).position == 3
    assert bench.executor.batches[-1].inputs.shape[0] == 2
    assert steps.held() == (0, 0, 0, 0)


async def test_a_step_of_several_turns_takes_them_one_by_one(bench, steps):
    inputs = random_inputs(10)
    steps.begin(inputs[:1], 0)
    await settle()
    assert not steps.begin(inputs[1:], 1).over
    np.testing.assert_array_equal((await steps.outcome(1)).outputs, run_whole(inputs)[0][1:])
    assert [batch.inputs.shape[1] for batch in bench.executor.batches] == [1, 4, 4, 1]


async def test_what_takes_its_time_is_begun_at_once_and_told_later(bench, steps):
    steps.begin(random_inputs(1), 0)
    await settle()
    bench.executor.hold()
    steps.through.clear()
    step = steps.begin(random_inputs(1), 1, limit=0.02)
    assert not step.over
    await bench.executor.entered.wait()
    assert steps.held()[::3] == (1, 1)
    await asyncio.wait_for(steps.through.wait(), 10)
    assert step.over
    assert isinstance(steps.came[KEY, 1], DeadlineExceeded)
    bench.executor.gate.set()
    await settle()
    assert (await bench.engine.sessions.get(KEY)).position == 1
    assert steps.held() == (0, 0, 0, 0)


async def test_what_goes_wrong_at_once_is_told_and_changes_nothing(bench, steps):
    def bad(batch):
        result = compute(batch)
        return result._replace(state=result.state * np.nan)

    def unavailable(batch):
        raise ExecutorUnavailable("gone for now")

    def fails(batch):
        raise ZeroDivisionError("of the test")

    steps.begin(random_inputs(1), 0)
    await settle()
    for fault, told in ((bad, BadModelOutput), (unavailable, ExecutorUnavailable), (fails, BadModelOutput)):
        bench.executor.fault = fault
        assert steps.begin(random_inputs(1), 1).over
        assert isinstance(steps.came.pop((KEY, 1)), told)
        assert steps.held() == (0, 0, 0, 0)
    bench.executor.fault = None
    assert steps.begin(random_inputs(1), 1).over
    assert (await bench.engine.sessions.get(KEY)).position == 2


async def test_a_session_that_is_another_one_by_the_commit_is_left_to_the_long_way(bench, steps):
    steps.begin(random_inputs(1), 0)
    await settle()
    key_there = bench.store._sessions[KEY]

    def meanwhile(batch):
        bench.store._sessions[KEY] = key_there._replace(token=bytes(len(key_there.token)))
        return compute(batch)

    bench.executor.fault = meanwhile
    assert steps.begin(random_inputs(1), 1).over
    assert steps.came[KEY, 1] is None
    assert steps.held() == (0, 0, 0, 0)


class Outcome:
    """Of a chunk of one row."""

    gone = ()
    came = None

    def set_results(self, rows, outputs, states, native=None):
        self.came = outputs

    def set_exception(self, rows, error):
        self.came = error


async def test_what_is_too_late_is_not_run_and_each_run_is_told_of():
    waits, runs = [], []
    observer, clock, executor = Observer(), Clock(), HereAndNow()
    observer.batch_formed = lambda key, its: waits.extend(its)
    observer.batch_ran = runs.append
    policy = BatchPolicy(max_batch_size=4, max_steps_per_turn=4, executor_timeout=10)
    batcher = Batcher(executor, policy=policy, clock=clock, timer=clock, observer=observer)
    clock.now = 5.0
    late, in_time = Outcome(), Outcome()
    batcher.put(version_of(), random_inputs(1)[None], [None], 5.0, late, lone=True)
    await settle()
    assert isinstance(late.came, DeadlineExceeded)
    assert not executor.batches
    batcher.put(version_of(), random_inputs(3)[None], [None], NEVER, in_time, lone=True)
    np.testing.assert_array_equal(in_time.came[0], run_whole(random_inputs(3))[0])
    assert waits == [0.0]
    assert [(run.rows, run.time_steps, run.failed) for run in runs] == [(1, 3, False)]
    await batcher.close()
    closed = Outcome()
    lane = batcher._open(version_of())
    await lane.close()
    batcher.put(version_of(), random_inputs(1)[None], [None], NEVER, closed, lone=True)
    await settle()
    assert closed.came is None
    assert len(executor.batches) == 1
    await batcher.close()


async def test_it_counts_as_a_short_one_for_those_that_are_long():
    def put(length, *, lone=False):
        batcher.put(version_of(), random_inputs(length)[None], [None], NEVER, Outcome(), lone=lone)

    policy = BatchPolicy(max_batch_size=1, max_steps_per_turn=3, executor_timeout=10, shared_steps=2, shared_seconds=1)
    clock, executor = Clock(), HereAndNow()
    batcher = Batcher(executor, policy=policy, clock=clock, timer=clock)
    put(9)
    await settle()
    assert [batch.inputs.shape[1] for batch in executor.batches] == [3, 3, 3]
    clock.now += 10
    put(1, lone=True)
    put(9)  # the next short one is expected: in smaller turns, so that it does not wait
    await settle()
    assert [batch.inputs.shape[1] for batch in executor.batches[3:]] == [1, 2, 2, 2, 2, 1]
    await batcher.close()


async def test_what_is_long_does_not_go_first_after_it_for_what_another_has_waited():
    policy = BatchPolicy(max_batch_size=1, max_steps_per_turn=3, executor_timeout=10)
    clock, executor = Clock(), HereAndNow()
    batcher = Batcher(executor, policy=policy, clock=clock, timer=clock)
    executor.hold()
    short = [submit(batcher, random_inputs(1, seed)) for seed in range(4)]
    await settle()
    gone = submit(batcher, random_inputs(9))
    await settle()
    for _ in range(3):  # of the short ones, which overtake it, the last is under way
        await until_the_next(executor)
    gone.cancel()
    executor.gate.set()
    await asyncio.gather(*short)
    begun = len(executor.batches)
    batcher.put(version_of(), random_inputs(1)[None], [None], NEVER, Outcome(), lone=True)
    assert len(executor.batches) == begun + 1
    others = submit(batcher, random_inputs(9)), submit(batcher, random_inputs(1))
    await asyncio.gather(*others)
    assert [batch.lengths.tolist() for batch in executor.batches[begun:]] == [[1], [1], [3], [3], [3]]
    await batcher.close()


class Through:
    """The handle of a step that was through before it was returned."""

    def __len__(self):
        return 0

    def names(self):
        return ()

    def cancel(self, request_id=None):
        raise AssertionError("it is through")


@pytest.mark.parametrize("form", ["alone", "in a message"])
async def test_what_is_through_at_once_is_answered_before_the_next_message_is_asked_for(form):
    happened = []

    def begin_one(request, arrived):
        handle = Through()
        arrived(handle, [answer_of(pb.StepResponse(request_id=request.request_id))], ())
        return handle

    def begin(requests, arrived):
        return [begin_one(request, arrived) for request in requests], ()

    async def messages():
        for name in "abc":
            happened.append(f"asked for {name}")
            request = pb.StepRequest(request_id=name, session_id="s")
            yield request if form == "alone" else pb.StreamStepsRequest(requests=[request])

    stream = StepStream(
        answer=None,
        refuse=None,
        check=lambda message: None,
        max_steps=10,
        drained=asyncio.Event(),
        begin=begin,
        begin_one=begin_one,
    )
    async for data in stream.run(messages()):
        assert not stream._handles
        happened += [f"answered {one.request_id}" for one in pb.StreamStepsResponse.FromString(data).responses]
    if form == "alone":
        assert happened == [f"{what} {name}" for name in "abc" for what in ("asked for", "answered")]
    assert sorted(happened) == sorted(f"{what} {name}" for name in "abc" for what in ("asked for", "answered"))
