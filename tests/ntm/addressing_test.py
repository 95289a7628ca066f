import numpy as np
import pytest
from keras import ops

from ntm import addressing, memory
from tests.ntm import oracle
from tests.ntm.support import gradients, numpy

BATCH, HEADS, SLOTS, DEPTH = 2, 3, 7, 5
RNG = np.random.default_rng(0)


def weightings(slots=SLOTS, seed=0):
    return np.random.default_rng(seed).dirichlet(np.ones(slots), size=(BATCH, HEADS))


def run(function, *arrays):
    return numpy(function(*map(ops.convert_to_tensor, arrays)))


MEMORY = RNG.normal(size=(BATCH, DEPTH, SLOTS))
KEYS = RNG.normal(size=(BATCH, HEADS, DEPTH))
STRENGTHS = RNG.uniform(0, 5, size=(BATCH, HEADS, 1))
GATES = RNG.uniform(size=(BATCH, HEADS, 1))
SHIFTS = RNG.dirichlet(np.ones(4), size=(BATCH, HEADS))
GAMMAS = RNG.uniform(1, 4, size=(BATCH, HEADS, 1))
ERASES = RNG.uniform(size=(BATCH, HEADS, DEPTH))
ADDS = RNG.normal(size=(BATCH, HEADS, DEPTH))

FUNCTIONS = {
    "cosine_similarity": (addressing.cosine_similarity, [KEYS, MEMORY]),
    "content_weighting": (addressing.content_weighting, [weightings(seed=3), STRENGTHS]),
    "interpolate": (addressing.interpolate, [weightings(seed=1), weightings(seed=2), GATES]),
    "shift": (addressing.shift, [weightings(), SHIFTS]),
    "sharpen": (addressing.sharpen, [weightings(), GAMMAS]),
    "read": (memory.read, [MEMORY, weightings()]),
    "erase_and_add": (memory.erase_and_add, [MEMORY, weightings(), ERASES, ADDS]),
}


@pytest.mark.parametrize(
    ("shift_range", "offsets"),
    [
        (1, (0,)),
        (2, (0, 1)),
        (3, (-1, 0, 1)),
        (4, (-1, 0, 1, 2)),
        (5, (-2, -1, 0, 1, 2)),
        (7, (-3, -2, -1, 0, 1, 2, 3)),
    ],
)
def test_a_one_hot_shift_moves_a_one_hot_focus_by_its_offset(shift_range, offsets):
    assert addressing.shift_offsets(shift_range) == offsets
    for start in range(SLOTS):
        for position, offset in enumerate(offsets):
            focus = np.eye(SLOTS)[start].reshape(1, 1, SLOTS)
            moved = run(addressing.shift, focus, np.eye(shift_range)[position].reshape(1, 1, -1))
            assert int(np.argmax(moved)) == (start + offset) % SLOTS
            np.testing.assert_allclose(moved.sum(), 1)


@pytest.mark.parametrize("slots", [4, 9])
def test_shift_is_the_circular_convolution_of_the_paper(slots):
    ours = run(addressing.shift, weightings(slots), SHIFTS)
    for row in range(BATCH):
        for head in range(HEADS):
            expected = oracle.shift(weightings(slots)[row, head].tolist(), SHIFTS[row, head].tolist())
            np.testing.assert_allclose(ours[row, head], expected, atol=1e-6)


def test_a_memory_of_a_millionth_is_seen_in_its_true_direction():
    tape = np.zeros((1, DEPTH, 2))
    tape[0, 0, 0] = tape[0, 1, 1] = 4.5e-6
    similarity = run(addressing.cosine_similarity, np.eye(DEPTH)[None, :1], tape)
    np.testing.assert_allclose(similarity[0, 0], [1, 0], atol=0.03)


def test_zero_keys_and_zero_slots_have_no_direction_and_no_nan():
    similarity = run(addressing.cosine_similarity, np.zeros((1, 1, DEPTH)), np.zeros((1, DEPTH, 3)))
    np.testing.assert_array_equal(similarity, 0)


@pytest.mark.parametrize("gamma", [1.0, 18.0, 21.0, 500.0])
def test_sharpening_a_uniform_focus_leaves_it_uniform_where_powers_underflow(gamma):
    uniform = ops.full((1, 1, 128), 1 / 128, dtype="float32")
    sharp = numpy(addressing.sharpen(uniform, ops.full((1, 1, 1), gamma, dtype="float32")))
    np.testing.assert_allclose(sharp, 1 / 128, rtol=1e-4)


def test_sharpening_with_one_changes_nothing_and_more_prefers_the_largest():
    same = run(addressing.sharpen, weightings(), np.ones((BATCH, HEADS, 1)))
    np.testing.assert_allclose(same, weightings(), atol=1e-6)
    sharp = run(addressing.sharpen, weightings(), np.full((BATCH, HEADS, 1), 50.0))
    np.testing.assert_array_equal(sharp.argmax(-1), weightings().argmax(-1))
    assert sharp.max(-1).min() > weightings().max(-1).min()


def test_the_gate_takes_content_at_one_and_the_previous_focus_at_zero():
    content, previous = weightings(seed=1), weightings(seed=2)
    ones = np.ones((BATCH, HEADS, 1))
    np.testing.assert_allclose(run(addressing.interpolate, content, previous, ones), content, atol=1e-7)
    np.testing.assert_allclose(run(addressing.interpolate, content, previous, 0 * ones), previous, atol=1e-7)


def test_two_writers_on_one_slot_erase_before_either_adds():
    focus = np.zeros((1, 2, 3))
    focus[:, :, 1] = 1
    tape = run(memory.erase_and_add, np.full((1, 2, 3), 5.0), focus, np.ones((1, 2, 2)), np.full((1, 2, 2), 2.0))
    np.testing.assert_allclose(tape[0], [[5, 4, 5], [5, 4, 5]])


def test_reading_with_a_one_hot_focus_gives_that_slot():
    focus = np.eye(SLOTS)[None, [2, 5]].repeat(BATCH, axis=0)
    reads = run(memory.read, MEMORY, focus)
    np.testing.assert_allclose(reads, MEMORY[:, :, [2, 5]].transpose(0, 2, 1), rtol=1e-6)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_are_those_of_finite_differences(name):
    function, values = FUNCTIONS[name]
    weights = np.random.default_rng(9).normal(size=run(function, *values).shape)

    def loss(tensors):
        return ops.sum(function(*tensors) * ops.cast(weights, tensors[0].dtype))

    found = gradients(loss, values)
    if found[0].dtype != np.float64:
        pytest.skip("finite differences need float64; start JAX with JAX_ENABLE_X64=1")
    for which, value in enumerate(values):
        for place in np.ndindex(value.shape):
            bumped = [np.array(array) for array in values]
            bumped[which][place] += 1e-6
            up = float(numpy(loss([ops.convert_to_tensor(array) for array in bumped])))
            bumped[which][place] -= 2e-6
            down = float(numpy(loss([ops.convert_to_tensor(array) for array in bumped])))
            assert found[which][place] == pytest.approx((up - down) / 2e-6, abs=1e-4)
