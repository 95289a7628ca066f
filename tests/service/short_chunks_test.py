"""Short chunks beside long ones: who goes first, and that neither is held up for good."""

import asyncio

import numpy as np
import pytest

from service.batcher import Batcher, BatchPolicy
from tests.service.batching import Clock, make, settle, submit
from tests.service.support import NumpyExecutor, random_inputs, run_whole


async def test_a_one_step_request_does_not_wait_for_a_long_one():
    batcher, executor, _ = make()
    executor.gate.clear()
    long = submit(batcher, random_inputs(300))
    await settle()
    short = submit(batcher, random_inputs(1))
    executor.gate.set()
    await short
    # The one that was held, its own, and the next one, which was under way before its result was handed out.
    assert len(executor.batches) <= 3
    assert not long.done()
    await long
    await batcher.close()


async def test_short_chunks_go_first_in_batches_of_their_own():
    policy = BatchPolicy(max_batch_size=8, max_steps_per_turn=10, executor_timeout=10)
    batcher, executor, _ = make(policy=policy)
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    flood = [submit(batcher, random_inputs(40, seed)) for seed in range(9)]
    await settle()
    short = [submit(batcher, random_inputs(length, length)) for length in (1, 3)]
    await settle()
    executor.gate.set()
    await asyncio.gather(first, *short)
    assert executor.batches[1].lengths.tolist() == [1, 3]
    for seed, task in enumerate(flood):
        np.testing.assert_array_equal((await task)[0], run_whole(random_inputs(40, seed))[0])
    assert executor.batches[2].lengths.tolist() == [10] * 8  # alone again, they get whole turns
    await batcher.close()


async def test_a_flood_of_short_chunks_does_not_stop_a_long_one():
    policy = BatchPolicy(max_batch_size=4, max_steps_per_turn=2, executor_timeout=10)
    batcher, executor, _ = make(policy=policy)
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    long = submit(batcher, random_inputs(6))
    flood = [submit(batcher, random_inputs(1, seed)) for seed in range(60)]
    await settle()
    executor.gate.set()
    await long
    turns = [index for index, batch in enumerate(executor.batches) if 2 in batch.lengths]
    assert turns == [4, 9, 14]  # three of short ones go first, and one while its last turn is handed out
    await asyncio.gather(first, *flood)
    await batcher.close()


async def test_a_short_one_is_not_lost_behind_a_long_one_that_was_given_up():
    batcher, executor, _ = make(policy=BatchPolicy(max_batch_size=1, max_steps_per_turn=3, executor_timeout=10))
    executor.gate.clear()
    short = [submit(batcher, random_inputs(1, seed)) for seed in range(5)]
    await settle()
    long = submit(batcher, random_inputs(9))
    await settle()
    for _ in range(3):  # of the short ones that may overtake it, the last is under way
        await until_the_next(executor)
    long.cancel()
    executor.gate.set()
    await asyncio.gather(*short)
    await batcher.close()


async def test_a_long_one_does_not_go_first_for_what_another_has_waited():
    batcher, executor, _ = make(policy=BatchPolicy(max_batch_size=1, max_steps_per_turn=3, executor_timeout=10))
    executor.gate.clear()
    short = [submit(batcher, random_inputs(1, seed)) for seed in range(4)]
    await settle()
    gone = submit(batcher, random_inputs(9))
    await settle()
    for _ in range(3):
        await until_the_next(executor)
    gone.cancel()
    short.append(submit(batcher, random_inputs(1)))
    await settle()
    await until_the_next(executor)
    begun = len(executor.batches)
    others = submit(batcher, random_inputs(9)), submit(batcher, random_inputs(1))
    await settle()
    executor.gate.set()
    await asyncio.gather(*short, *others)
    assert [batch.lengths.tolist() for batch in executor.batches[begun:]] == [[1], [3], [3], [3]]
    await batcher.close()


async def until_the_next(executor):
    """Lets the batch that is held end; the next one is held instead."""
    executor.gate.set()
    await asyncio.sleep(0)
    executor.gate.clear()
    executor.entered.clear()
    await executor.entered.wait()


class EagerExecutor(NumpyExecutor):
    """Takes two calls more than it runs."""

    ahead = 2

    def begin(self, key, batch, *, company=False):
        return asyncio.create_task(self.step(key, batch))


@pytest.mark.parametrize(
    ("kind", "seconds", "waits"),
    [
        (EagerExecutor, 0.0005, True),
        (EagerExecutor, 0.005, False),
        (NumpyExecutor, 0.0005, False),  # a call to another process may hang, and others need not
    ],
)
async def test_a_few_rows_wait_for_a_batch_that_is_over_soon(kind, seconds, waits):
    clock = Clock()
    executor = kind(max_in_flight=2)
    policy = BatchPolicy(max_batch_size=8, max_steps_per_turn=10, executor_timeout=10)
    batcher = Batcher(executor, policy=policy, clock=clock, timer=clock)
    for seed in range(40):  # so long each of them takes
        executor.hold()
        step = submit(batcher, random_inputs(1, seed))
        await executor.entered.wait()
        clock.now += seconds
        executor.gate.set()
        await step
    executor.hold()
    steps = [submit(batcher, random_inputs(1))]
    await executor.entered.wait()
    began = len(executor.batches)
    for _ in range(3):
        steps.append(submit(batcher, random_inputs(1)))
        await settle()
    assert len(executor.batches) == began + (not waits)
    steps.append(submit(batcher, random_inputs(1)))
    await settle()
    assert len(executor.batches) == began + 1  # half of a batch is worth it; two are all that run
    executor.gate.set()
    await asyncio.gather(*steps)
    await batcher.close()


async def test_nothing_waits_for_a_long_batch():
    executor, clock = EagerExecutor(max_in_flight=2), Clock()
    policy = BatchPolicy(max_batch_size=8, max_steps_per_turn=100, executor_timeout=10)
    batcher = Batcher(executor, policy=policy, clock=clock, timer=clock)
    for seed in range(40):
        await submit(batcher, random_inputs(1, seed))
    executor.hold()
    steps = [submit(batcher, random_inputs(100))]
    await executor.entered.wait()
    began = len(executor.batches)
    steps.append(submit(batcher, random_inputs(1)))
    await settle()
    assert len(executor.batches) == began + 1
    executor.gate.set()
    await asyncio.gather(*steps)
    await batcher.close()


@pytest.mark.parametrize(
    ("rows", "length", "seconds", "begun"),
    [
        (40, 10, 0.005, 4),
        (20, 10, 0.005, 3),  # the last is half full
        (19, 10, 0.005, 2),
        (40, 10, 0.5, 2),  # they take so long that nobody gains by it
        (40, 11, 0.005, 2),  # long chunks: short ones could not overtake them there
    ],
)
async def test_full_batches_of_short_chunks_wait_ahead_in_the_executor(rows, length, seconds, begun):
    clock, executor = Clock(), EagerExecutor(max_in_flight=2)
    policy = BatchPolicy(max_batch_size=8, max_steps_per_turn=10, executor_timeout=10)
    batcher = Batcher(executor, policy=policy, clock=Clock(), timer=clock)
    for seed in range(40):  # so long each of them takes
        executor.hold()
        steps = [submit(batcher, random_inputs(10, seed)) for _ in range(8)]
        await executor.entered.wait()
        clock.now += seconds
        executor.gate.set()
        await asyncio.gather(*steps)
    executor.hold()
    before = len(executor.batches)
    steps = [submit(batcher, random_inputs(length, seed)) for seed in range(rows)]
    await settle()
    assert len(executor.batches) - before == begun
    executor.gate.set()
    for seed, outcome in enumerate(await asyncio.gather(*steps)):
        np.testing.assert_array_equal(outcome[0], run_whole(random_inputs(length, seed))[0])
    await batcher.close()
