import asyncio

import numpy as np
import pytest

from service.errors import (
    BadModelOutput,
    DeadlineExceeded,
    Draining,
    ExecutorUnavailable,
    InvalidTensor,
    Overloaded,
    PositionMismatch,
    StepConflict,
    StoreUnavailable,
)
from service.sessions.memory import MemoryStore
from service.types import SessionKey, StepBatchResult
from tests.service.benches import KEY, Bench, Clock
from tests.service.support import compute, random_inputs, run_whole


async def test_chunks_of_a_sequence_give_what_the_whole_gives():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(25)
        replies = [await bench.step(inputs[a:b], a) for a, b in [(0, 1), (1, 10), (10, 11), (11, 25)]]
        np.testing.assert_array_equal(np.concatenate([reply.outputs for reply in replies]), run_whole(inputs)[0])
        assert [reply.position for reply in replies] == [1, 10, 11, 25]


async def test_a_repeated_step_gets_the_same_reply_and_runs_once():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(6)
        await bench.step(inputs[:2], 0)
        first = await bench.step(inputs[2:4], 2)
        ran = len(bench.executor.batches)
        again = await bench.step(inputs[2:4].copy(), 2)
        assert len(bench.executor.batches) == ran
        assert again.position == first.position
        np.testing.assert_array_equal(again.outputs, first.outputs)
        after = await bench.step(inputs[4:], 4)
        np.testing.assert_array_equal(after.outputs, run_whole(inputs)[0][4:])


async def test_other_inputs_at_the_same_place_are_a_conflict():
    async with Bench() as bench:
        await bench.create()
        await bench.step(random_inputs(2), 0)
        with pytest.raises(StepConflict) as caught:
            await bench.step(random_inputs(2, seed=9), 0)
        assert caught.value.metadata == {"position": "2", "last_begin": "0"}


@pytest.mark.parametrize("position", [1, 3, 100])
async def test_any_other_position_is_a_mismatch_that_tells_where_the_session_stands(position):
    async with Bench() as bench:
        await bench.create()
        await bench.step(random_inputs(2), 0)
        with pytest.raises(PositionMismatch) as caught:
            await bench.step(random_inputs(2), position)
        assert caught.value.metadata == {"position": "2", "last_begin": "0"}
        assert (await bench.engine.sessions.get(KEY)).position == 2


async def test_a_fresh_session_has_nothing_to_replay():
    async with Bench() as bench:
        await bench.create()
        with pytest.raises(PositionMismatch) as caught:
            await bench.step(random_inputs(1), 5)
        assert caught.value.metadata == {"position": "0", "last_begin": ""}


async def test_without_a_position_a_step_applies_wherever_the_session_stands():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(4)
        await bench.step(inputs[:2], None)
        reply = await bench.step(inputs[2:], None)
        np.testing.assert_array_equal(reply.outputs, run_whole(inputs)[0][2:])


async def test_steps_of_one_session_wait_their_turn_in_order():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(9)
        tasks = [asyncio.create_task(bench.step(inputs[n : n + 3], n)) for n in (0, 3, 6)]
        replies = await asyncio.gather(*tasks)
        np.testing.assert_array_equal(np.concatenate([r.outputs for r in replies]), run_whole(inputs)[0])


async def test_a_failed_step_leaves_the_session_as_it_was():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(12)
        await bench.step(inputs[:2], 0)
        before = await bench.engine.sessions.get(KEY)

        def bad_on_the_second_slice(batch):
            good = compute(batch)
            if len(bench.executor.batches) == 3:
                return StepBatchResult(good.outputs * np.float32(np.nan), good.state)
            return good

        bench.executor.fault = bad_on_the_second_slice
        with pytest.raises(BadModelOutput):
            await bench.step(inputs[2:], 2)
        bench.executor.fault = None
        assert (await bench.engine.sessions.get(KEY)).token == before.token
        reply = await bench.step(inputs[2:], 2)
        np.testing.assert_array_equal(reply.outputs, run_whole(inputs)[0][2:])


async def test_a_time_limit_that_passes_leaves_the_session_as_it_was_and_frees_its_turn():
    async with Bench() as bench:
        await bench.create()
        bench.executor.hold()
        with pytest.raises(DeadlineExceeded):
            await bench.step(random_inputs(2), 0, limit=0.02)
        bench.executor.gate.set()
        reply = await bench.step(random_inputs(2), 0)
        np.testing.assert_array_equal(reply.outputs, run_whole(random_inputs(2))[0])


async def test_a_cancelled_step_frees_its_turn_and_its_permit():
    async with Bench(max_steps=1) as bench:
        await bench.create()
        bench.executor.hold()
        task = asyncio.create_task(bench.step(random_inputs(2), 0))
        await bench.executor.entered.wait()
        with pytest.raises(Overloaded):
            await bench.step(random_inputs(1), 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bench.executor.gate.set()
        assert (await bench.step(random_inputs(2), 0)).position == 2


async def test_a_width_that_is_not_the_model_s_is_refused_and_named():
    async with Bench() as bench:
        await bench.create()
        with pytest.raises(InvalidTensor, match=r"\[1, 3\]; model sums/1 takes \[time, 2\]") as caught:
            await bench.step(np.zeros((1, 3), np.float32), 0)
        assert caught.value.field == "inputs.shape"
        assert (await bench.step(random_inputs(1), 0)).position == 1


async def test_draining_lets_steps_finish_and_takes_none():
    async with Bench() as bench:
        await bench.create()
        bench.executor.hold()
        task = asyncio.create_task(bench.step(random_inputs(1), 0))
        await bench.executor.entered.wait()
        assert not await bench.engine.drain(0.01)
        with pytest.raises(Draining):
            await bench.step(random_inputs(1), 1)
        with pytest.raises(Draining):
            await bench.create(SessionKey("p", "b"))
        bench.executor.gate.set()
        assert await bench.engine.drain(5)
        assert (await task).position == 1


async def test_before_the_models_are_there_everything_is_refused_for_now():
    bench = Bench()
    with pytest.raises(ExecutorUnavailable):
        await bench.create()
    with pytest.raises(ExecutorUnavailable):
        await bench.engine.models()


class Unreliable(MemoryStore):
    """Refuses a commit before it is written."""

    broken = False

    async def commit(self, key, commit):
        if self.broken:
            raise StoreUnavailable("down")
        return await super().commit(key, commit)


async def test_a_store_that_is_down_fails_the_step_and_keeps_the_session():
    store = Unreliable(max_sessions=10, clock=Clock())
    async with Bench(store=store) as bench:
        await bench.create()
        store.broken = True
        with pytest.raises(StoreUnavailable):
            await bench.step(random_inputs(2), 0)
        store.broken = False
        assert (await bench.engine.sessions.get(KEY)).position == 0
        np.testing.assert_array_equal((await bench.step(random_inputs(2), 0)).outputs, run_whole(random_inputs(2))[0])
