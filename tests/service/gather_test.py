"""How the slices of chunks are put together to a batch: in bulk where they are alike, and always to the same."""

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.chunk import Chunk, extent_of, gather
from tests.service.support import INPUT_DIM, STATE_SIZE, version_of

CHUNK = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.sampled_from(["list", "array", "fresh"]))
ALIKE = st.tuples(st.just(1), st.just(2), st.just(0), st.just("list"))


def chunk_of(rng, rows, turn, taken, kind):
    """A chunk that has run ``taken`` time steps and has ``turn`` of the others before it, and maybe more."""
    inputs = rng.normal(size=(rows, taken + turn + int(rng.integers(2) and taken), INPUT_DIM)).astype(np.float32)
    states = rng.normal(size=(rows, STATE_SIZE)).astype(np.float32)
    given_states = states if kind == "array" else [None if kind == "fresh" else state for state in states]
    chunk = Chunk(None, inputs, given_states, 0.0, None)
    chunk.taken, chunk.turn = taken, turn
    return chunk


@settings(max_examples=400, deadline=None)
@example([(1, 2, 0, "list"), (1, 1, 1, "list")], 0)  # as long as the first, but only the rest of it is left to run
@example([(1, 1, 1, "list"), (1, 1, 1, "list")], 0)
@example([(1, 2, 0, "list"), (1, 2, 0, "fresh")], 0)
@given(st.lists(CHUNK | ALIKE, min_size=1, max_size=6) | st.lists(ALIKE, min_size=2, max_size=6), st.integers(0, 3))
def test_a_batch_is_the_rows_of_its_chunks_one_below_the_other(plan, padding):
    rng = np.random.default_rng(len(plan))
    items = [chunk_of(rng, *one) for one in plan]
    rows, turn, steps = extent_of(items)
    assert (rows, turn) == (sum(item.size for item in items), max(item.turn for item in items))
    assert steps == sum(item.size * item.turn for item in items)
    batch = gather(items, (rows + padding, turn + 1), version_of())
    at = 0
    for item in items:
        for row in range(item.size):
            expected = np.zeros((turn + 1, INPUT_DIM), np.float32)
            expected[: item.turn] = item.inputs[row, item.taken : item.taken + item.turn]
            np.testing.assert_array_equal(batch.inputs[at], expected)
            assert batch.lengths[at] == item.turn
            fresh = item.states[row] is None
            assert batch.reset[at] == fresh
            np.testing.assert_array_equal(batch.state[at], 0 if fresh else item.states[row])
            at += 1
    assert (batch.lengths[at:] == 0).all()
    assert batch.reset[at:].all()
    assert not batch.state[at:].any()
    assert not batch.inputs[at:].any()
