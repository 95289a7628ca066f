"""The batch that is filled anew for each chunk that runs by itself: what would have been gathered, and never shared."""

import asyncio

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.batcher import BatchPolicy
from service.chunk import Chunk, gather
from service.errors import ExecutorUnavailable
from service.kept_batch import KeptBatch
from tests.service.batching import NEVER, make, settle
from tests.service.support import INPUT_DIM, STATE_SIZE, NumpyExecutor, random_inputs, run_whole, version_of

FIELDS = ("inputs", "lengths", "reset", "state")
CHUNKS = st.lists(st.tuples(st.integers(1, 4), st.booleans(), st.integers(4, 5), st.booleans()), min_size=1, max_size=8)


def chunk_of(rng, turn, *, fresh=False):
    inputs = rng.normal(size=(1, turn, INPUT_DIM)).astype(np.float32)
    chunk = Chunk(None, inputs, [None if fresh else rng.normal(size=STATE_SIZE).astype(np.float32)], 0.0, None)
    chunk.turn = turn
    return chunk


def taken(kept, chunk, bucket):
    """What the chunk's batch is, once it has been seen to be what it would be gathered to."""
    batch = kept.take(chunk, bucket)
    for field, gathered in zip(FIELDS, gather([chunk], bucket, version_of()), strict=False):
        np.testing.assert_array_equal(getattr(batch, field), gathered)
    assert batch.again
    assert batch.aligned
    assert (batch.origins, batch.native) == ((), None)
    return batch


@settings(max_examples=200, deadline=None)
@example([(4, False, 4, True), (1, True, 4, True), (2, False, 4, True)])
@example([(1, False, 4, False), (1, False, 4, True), (1, False, 5, True), (1, False, 4, True)])
@given(CHUNKS)
def test_it_is_what_the_chunk_would_be_gathered_to(chunks):
    rng = np.random.default_rng(len(chunks))
    kept, last = KeptBatch(version_of()), None
    for turn, fresh, steps, give_back in chunks:
        before = None if last is None else [getattr(last[0], field).copy() for field in FIELDS]
        batch = taken(kept, chunk_of(rng, turn, fresh=fresh), (1, steps))
        if last is not None:
            its, its_steps, given_back = last
            assert (batch is its) == (given_back and steps == its_steps)
            if not given_back:  # whoever still reads it finds what was there
                for field, there in zip(FIELDS, before, strict=True):
                    np.testing.assert_array_equal(getattr(its, field), there)
        if give_back:
            kept.give_back(batch)
        last = batch, steps, give_back


@pytest.mark.parametrize(("turns", "steps"), [((4, 1, 1), (4, 4, 4)), ((2, 2, 2), (4, 5, 5)), ((3, 1, 2), (4, 5, 4))])
def test_one_that_is_given_back_after_another_was_taken_is_still_told_from_it(turns, steps):
    rng = np.random.default_rng(0)
    kept = KeptBatch(version_of())
    first = taken(kept, chunk_of(rng, turns[0]), (1, steps[0]))
    taken(kept, chunk_of(rng, turns[1]), (1, steps[1]))
    kept.give_back(first)
    taken(kept, chunk_of(rng, turns[2]), (1, steps[2]))


def test_other_batches_are_gathered_and_it_stays():
    rng = np.random.default_rng(0)
    kept = KeptBatch(version_of())
    batch = taken(kept, chunk_of(rng, 1), (1, 4))
    kept.give_back(batch)
    several = Chunk(None, np.zeros((2, 1, INPUT_DIM), np.float32), [None, None], 0.0, None)
    traced, together = chunk_of(rng, 1), chunk_of(rng, 1)
    traced.origin = "a span"
    together.states = np.zeros((1, STATE_SIZE), np.float32)
    for chunk, rows in ((several, 2), (traced, 1), (together, 1), (chunk_of(rng, 1), 2)):
        assert kept.take(chunk, (rows, 4)) is None
        kept.give_back(gather([chunk], (rows, 4), version_of()))
    kept.give_back(None)
    assert taken(kept, chunk_of(rng, 2), (1, 4)) is batch


class Watched(NumpyExecutor):
    """Keeps what was in its batches when they came."""

    def __init__(self):
        super().__init__()
        self.came = []

    async def step(self, key, batch):
        self.came.append([getattr(batch, field).copy() for field in FIELDS])
        return await super().step(key, batch)

    def unchanged(self, at):
        return all(map(np.array_equal, self.came[at], [getattr(self.batches[at], field) for field in FIELDS]))


class Outcome:
    gone = ()

    def __init__(self):
        self.came = asyncio.get_running_loop().create_future()

    def set_results(self, rows, outputs, states, native=None):
        self.came.set_result((outputs[0].copy(), states[0].copy()))

    def set_exception(self, rows, error):
        self.came.set_exception(error)


def put(batcher, inputs, state=None):
    outcome = Outcome()
    batcher.put(version_of(), inputs[None], [state], NEVER, outcome, lone=True)
    return outcome.came


async def test_one_chunk_after_the_other_has_it_and_what_they_came_to_stays():
    executor = Watched()
    batcher, *_ = make(executor)
    inputs, state, came = random_inputs(5), None, []
    for begin in range(5):
        outputs, state = await put(batcher, inputs[begin : begin + 1], state)
        came.append(outputs)
    assert len({id(batch) for batch in executor.batches}) == 1
    whole, last = run_whole(inputs)
    np.testing.assert_array_equal(np.concatenate(came), whole)
    np.testing.assert_array_equal(state, last)
    await batcher.close()


async def test_a_call_that_was_given_up_keeps_its_batch():
    executor = Watched()
    policy = BatchPolicy(max_batch_size=4, max_steps_per_turn=3, executor_timeout=0.01)
    batcher, *_ = make(executor, policy)
    await put(batcher, random_inputs(1))
    executor.hold()
    with pytest.raises(ExecutorUnavailable):
        await put(batcher, random_inputs(1))
    executor.gate.set()
    await put(batcher, random_inputs(1), np.ones(STATE_SIZE, np.float32))
    first, given_up, next_one = executor.batches
    assert first is given_up
    assert next_one is not given_up
    assert executor.unchanged(1)
    await batcher.close()


async def test_while_one_runs_another_one_has_a_batch_of_its_own():
    executor = Watched()
    batcher, *_ = make(executor)
    executor.hold()
    inputs = random_inputs(2)
    first = put(batcher, inputs[:1])
    await settle()
    second = put(batcher, inputs, np.ones(STATE_SIZE, np.float32))
    executor.gate.set()
    outputs, _ = await first
    await second
    np.testing.assert_array_equal(outputs, run_whole(inputs[:1])[0])
    assert executor.batches[0] is not executor.batches[1]
    assert executor.unchanged(0)
    await batcher.close()
