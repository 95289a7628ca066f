"""Chunks that expire or are cancelled, waiting or on their way."""

import asyncio
import gc
import weakref

import pytest

from service.errors import DeadlineExceeded, ExecutorUnavailable
from tests.service.batching import make, settle, submit
from tests.service.support import random_inputs


async def test_what_has_expired_is_not_run():
    batcher, executor, clock = make()
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    late = submit(batcher, random_inputs(1), deadline=5.0)
    await settle()
    clock.now = 5.0
    executor.gate.set()
    with pytest.raises(DeadlineExceeded):
        await late
    await first
    assert len(executor.batches) == 1
    await batcher.close()


async def test_a_long_chunk_that_expires_on_its_way_stops_there():
    batcher, executor, clock = make()
    ran = asyncio.Event()

    def expire_after_two(batch):
        if len(executor.batches) == 2:
            clock.now = 9.0
            ran.set()

    executor.fault = expire_after_two
    with pytest.raises(DeadlineExceeded):
        await submit(batcher, random_inputs(30), deadline=8.0)
    assert ran.is_set()
    assert len(executor.batches) == 2
    await batcher.close()


async def test_a_cancelled_chunk_leaves_its_place_and_its_batch_mates_alone():
    batcher, executor, _ = make()
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    waiting = [submit(batcher, random_inputs(1, seed)) for seed in range(3)]
    running_cancelled = first
    await settle()
    waiting[1].cancel()
    running_cancelled.cancel()
    await settle()
    executor.gate.set()
    await asyncio.gather(waiting[0], waiting[2])
    assert [int((batch.lengths > 0).sum()) for batch in executor.batches] == [1, 2]
    await batcher.close()


async def test_what_was_cancelled_while_it_waited_holds_neither_memory_nor_a_place():
    batcher, executor, _ = make()
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    waiting = [submit(batcher, random_inputs(1)) for _ in range(20)]
    held = []

    async def give_up(count):
        for _ in range(count):
            inputs = random_inputs(2)
            held.append(weakref.ref(inputs))
            task = submit(batcher, inputs)
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    await give_up(5)
    gc.collect()
    assert sum(reference() is not None for reference in held) <= 1  # the last task's traceback has it
    await give_up(500)
    assert sum(batcher.queued().values()) <= 2 * len(waiting)
    executor.gate.set()
    await asyncio.gather(first, *waiting)
    await batcher.close()


async def test_close_fails_what_waits_and_what_runs():
    batcher, executor, _ = make()
    executor.gate.clear()
    running = submit(batcher, random_inputs(1))
    await settle()
    waiting = submit(batcher, random_inputs(1))
    await settle()
    await batcher.close()
    for task in (running, waiting):
        with pytest.raises(ExecutorUnavailable):
            await task
