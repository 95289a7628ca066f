import asyncio
import dataclasses
import gc
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import Batcher, BatchPolicy
from service.errors import BadModelOutput, DeadlineExceeded, ExecutorUnavailable
from service.types import StepBatchResult
from tests.service.support import (
    INPUT_DIM,
    OUTPUT_DIM,
    NumpyExecutor,
    compute,
    initial_state,
    random_inputs,
    run_whole,
    version_of,
)

POLICY = BatchPolicy(max_batch_size=4, max_steps_per_turn=3, executor_timeout=10)
NEVER = float("inf")


class Clock:
    """Moved by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def make(executor=None, policy=POLICY):
    clock = Clock()
    executor = executor or NumpyExecutor()
    return Batcher(executor, policy=policy, clock=clock), executor, clock


def submit(batcher, inputs, state=None, deadline=NEVER, version=None):
    return asyncio.create_task(batcher.submit(version or version_of(), inputs, state, deadline))


async def settle():
    """Lets everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 11), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 5),
    st.integers(1, 6),
    st.integers(1, 3),
)
def test_whatever_the_batches_each_chunk_gets_its_own_outputs(chunks, max_batch, max_steps, in_flight):
    async def run():
        policy = BatchPolicy(max_batch_size=max_batch, max_steps_per_turn=max_steps, executor_timeout=10)
        batcher, executor, _ = make(NumpyExecutor(max_in_flight=in_flight), policy)
        rng = np.random.default_rng(0)
        work = []
        for length, fresh in chunks:
            inputs = rng.normal(size=(length, INPUT_DIM)).astype(np.float32)
            state = None if fresh else rng.normal(size=5).astype(np.float32)
            work.append((inputs, state, submit(batcher, inputs, state)))
        for inputs, state, task in work:
            outputs, after = await task
            expected, expected_state = run_whole(inputs, state)
            np.testing.assert_array_equal(outputs, expected)
            np.testing.assert_array_equal(after, expected_state)
        for batch in executor.batches:
            assert (batch.lengths > 0).sum() <= max_batch
            assert batch.lengths.max() <= max_steps
        await batcher.close()

    asyncio.run(run())


class Rows:
    """Where the outcomes of a chunk of several rows go."""

    def __init__(self, count):
        self.gone = set()
        self.came = {}
        self.open = set(range(count))
        self.over = asyncio.Event()

    def set_results(self, rows, outputs, states):
        for row, output, state in zip(rows, outputs, states, strict=True):
            self._told(row, (output.copy(), state.copy()))

    def set_exception(self, rows, error):
        for row in rows:
            self._told(row, error)

    def _told(self, row, what):
        if row in self.gone:
            return
        self.open.remove(row)  # each is told once
        self.came[row] = what
        if not self.open:
            self.over.set()

    def give_up(self, row, chunk):
        self.gone.add(row)
        self.open.discard(row)
        chunk.leave(row)
        if not self.open:
            self.over.set()


@settings(max_examples=80, deadline=None)
@given(
    chunks=st.lists(
        st.tuples(
            st.lists(st.sampled_from(["fresh", "stepped", "poisoned", "given up", "given up later"]), min_size=1),
            st.integers(1, 7),
            st.sampled_from("ab"),
        ),
        min_size=1,
        max_size=5,
    ),
    max_batch=st.integers(1, 5),
    max_steps=st.integers(1, 6),
    in_flight=st.integers(1, 3),
    raises=st.booleans(),
)
def test_rows_that_go_together_get_what_they_would_get_alone(chunks, max_batch, max_steps, in_flight, raises):
    async def run():
        policy = BatchPolicy(max_batch_size=max_batch, max_steps_per_turn=max_steps, executor_timeout=10)
        batcher, executor, _ = make(NumpyExecutor(max_in_flight=in_flight), policy)
        executor.fault = raise_on_poison if raises else nan_state_on_poison
        rng, work = np.random.default_rng(0), []
        for kinds, length, caller in chunks:
            inputs = rng.normal(size=(len(kinds), length, INPUT_DIM)).astype(np.float32)
            inputs[[kind == "poisoned" for kind in kinds], -1] = POISON
            states = [None if kind == "fresh" else rng.normal(size=5).astype(np.float32) for kind in kinds]
            rows = Rows(len(kinds))
            chunk = batcher.put(version_of(), inputs, states, NEVER, rows, caller)
            work.append((kinds, inputs, states, rows, chunk))
        for when, turns in (("given up", 0), ("given up later", 3)):
            for _ in range(turns):
                await asyncio.sleep(0)
            for kinds, _, _, rows, chunk in work:
                for row in [row for row, kind in enumerate(kinds) if kind == when and row in rows.open]:
                    rows.give_up(row, chunk)
        for kinds, inputs, states, rows, _ in work:
            await asyncio.wait_for(rows.over.wait(), 10)
            for row, kind in enumerate(kinds):
                if kind == "poisoned":
                    assert isinstance(rows.came[row], BadModelOutput)
                elif row not in rows.gone:
                    outputs, state = rows.came[row]
                    expected, expected_state = run_whole(inputs[row], states[row])
                    np.testing.assert_array_equal(outputs, expected)
                    np.testing.assert_array_equal(state, expected_state)
        assert all((batch.lengths > 0).sum() <= max_batch for batch in executor.batches)
        assert not any(batcher.queued().values())
        await batcher.close()

    asyncio.run(run())


async def test_what_waits_while_a_batch_runs_goes_in_the_next_one():
    batcher, executor, _ = make()
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    others = [submit(batcher, random_inputs(1, seed)) for seed in range(3)]
    await settle()
    executor.gate.set()
    await asyncio.gather(first, *others)
    assert [int((batch.lengths > 0).sum()) for batch in executor.batches] == [1, 3]
    await batcher.close()


async def test_results_are_handed_out_while_the_next_batch_runs():
    batcher, executor, _ = make()
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    second = submit(batcher, random_inputs(1))
    await settle()
    plain = executor.step

    async def step(key, batch):
        assert not first.done()
        executor.gate.clear()
        return await plain(key, batch)

    executor.step = step
    executor.gate.set()
    await first
    assert not second.done()
    executor.gate.set()
    await second
    await batcher.close()


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


async def test_rows_past_the_items_step_nothing():
    batcher, executor, _ = make()
    executor.gate.clear()
    tasks = [submit(batcher, random_inputs(1))]
    await settle()
    tasks += [submit(batcher, random_inputs(2, seed), initial_state()) for seed in range(3)]
    executor.gate.set()
    await asyncio.gather(*tasks)
    batch = executor.batches[1]
    assert batch.lengths.tolist() == [2, 2, 2, 0]
    assert batch.reset.tolist() == [False, False, False, True]
    await batcher.close()


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


async def test_a_number_that_has_come_to_stand_for_another_model_gets_queues_of_its_own():
    batcher, executor, _ = make()
    await submit(batcher, random_inputs(1))
    wider = dataclasses.replace(version_of(fingerprint="f2"), output_dim=OUTPUT_DIM + 1)

    def widen(batch):
        good = compute(batch)
        return StepBatchResult(np.pad(good.outputs, ((0, 0), (0, 0), (0, 1))), good.state)

    executor.fault = widen
    outputs, _ = await submit(batcher, random_inputs(2), version=wider)
    assert outputs.shape == (2, OUTPUT_DIM + 1)
    await batcher.close()


POISON = np.float32(666)


def poisoned(batch):
    return bool((batch.inputs == POISON).any())


def raise_on_poison(batch):
    if poisoned(batch):
        raise RuntimeError("the op does not like this")


def wrong_shape_on_poison(batch):
    if poisoned(batch):
        good = compute(batch)
        return StepBatchResult(good.outputs[:, :, :1], good.state)
    return None


def nan_state_on_poison(batch):
    good = compute(batch)
    good.state[(batch.inputs == POISON).any(axis=(1, 2)), 0] = np.nan
    return good


def infinite_output_on_poison(batch):
    good = compute(batch)
    good.outputs[(batch.inputs == POISON).any(axis=(1, 2)), 0, 0] = np.inf
    return good


@pytest.mark.parametrize(
    "fault", [raise_on_poison, wrong_shape_on_poison, nan_state_on_poison, infinite_output_on_poison]
)
@pytest.mark.parametrize("where", [0, 1, 3])
async def test_one_poison_item_fails_alone(fault, where):
    policy = BatchPolicy(max_batch_size=4, max_steps_per_turn=3, executor_timeout=10)
    batcher, executor, _ = make(policy=policy)
    executor.fault = fault
    executor.gate.clear()
    first = submit(batcher, random_inputs(1))
    await settle()
    chunks = [random_inputs(2, seed) for seed in range(4)]
    chunks[where][1, 0] = POISON
    tasks = [submit(batcher, chunk) for chunk in chunks]
    executor.gate.set()
    await first
    for index, (chunk, task) in enumerate(zip(chunks, tasks, strict=True)):
        if index == where:
            with pytest.raises(BadModelOutput):
                await task
        else:
            np.testing.assert_array_equal((await task)[0], run_whole(chunk)[0])
    await batcher.close()


async def test_an_executor_that_hangs_fails_its_batch_and_the_next_one_runs():
    batcher, executor, _ = make(policy=BatchPolicy(max_batch_size=4, max_steps_per_turn=3, executor_timeout=0.05))
    executor.gate.clear()
    with pytest.raises(ExecutorUnavailable, match="did not answer"):
        await submit(batcher, random_inputs(1))
    executor.gate.set()
    outputs, _ = await submit(batcher, random_inputs(2))
    np.testing.assert_array_equal(outputs, run_whole(random_inputs(2))[0])
    await batcher.close()


async def test_a_slow_model_does_not_hold_up_another():
    slow, fast = version_of("slow"), version_of("fast")
    executor = NumpyExecutor(slow, fast)
    batcher, _, _ = make(executor)
    held = asyncio.Event()
    plain = executor.step

    async def step(key, batch):
        if key.model == "slow":
            await held.wait()
        return await plain(key, batch)

    executor.step = step
    waits = submit(batcher, random_inputs(1), version=slow)
    await settle()
    await submit(batcher, random_inputs(1), version=fast)
    assert not waits.done()
    held.set()
    await waits
    await batcher.close()


async def test_inputs_and_states_that_were_handed_in_are_never_written():
    batcher, _, _ = make()
    inputs, state = random_inputs(7), initial_state()
    inputs.setflags(write=False)
    state.setflags(write=False)
    outputs, after = await submit(batcher, inputs, state)
    assert outputs.base is None or outputs.base.nbytes == outputs.nbytes
    assert after.base is None  # a view would keep the whole batch alive
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
        executor.gate.set()
        await asyncio.sleep(0)
        executor.gate.clear()
        executor.entered.clear()
        await executor.entered.wait()
    long.cancel()
    executor.gate.set()
    await asyncio.gather(*short)
    await batcher.close()
