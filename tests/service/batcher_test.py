import asyncio
import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import BatchPolicy
from service.types import StepBatchResult
from tests.service.batching import make, settle, submit
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
