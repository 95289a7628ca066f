"""What an executor does wrong, and that each row gets what it would get alone."""

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.batcher import BatchPolicy
from service.errors import BadModelOutput, ExecutorUnavailable
from service.types import StepBatchResult
from tests.service.batching import NEVER, make, settle, submit
from tests.service.support import INPUT_DIM, NumpyExecutor, compute, random_inputs, run_whole, version_of


class Rows:
    """Where the outcomes of a chunk of several rows go."""

    def __init__(self, count):
        self.gone = set()
        self.came = {}
        self.open = set(range(count))
        self.over = asyncio.Event()

    def set_results(self, rows, outputs, states, native=None):
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
