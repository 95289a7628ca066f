"""A loaded version, over batches that lie in memory as TensorFlow wants them and otherwise."""

import numpy as np
import pytest

from service.executors.saved_model import SavedModel
from service.types import ALIGNMENT, StepBatch, VersionKey, batch_of, empty_batch
from tests.service.executors.sequence_models import WIDTH, assert_close, expected, export_sums, random_batch

FIELDS = ("inputs", "lengths", "reset", "state")


def place_of(array):
    return array.__array_interface__["data"][0] % ALIGNMENT


def aligned(batch):
    rows, steps, width = batch.inputs.shape
    copy = empty_batch(rows, steps, width, batch.state.shape[1])
    for field in FIELDS:
        getattr(copy, field)[:] = getattr(batch, field)
        assert place_of(getattr(copy, field)) == 0
    return copy


def shifted(array):
    """Where no array of TensorFlow's begins."""
    block = np.empty(array.nbytes + 2 * ALIGNMENT, np.uint8)
    first = (4 - place_of(block)) % ALIGNMENT
    view = block[first : first + array.nbytes].view(array.dtype).reshape(array.shape)
    view[:] = array
    assert place_of(view) == 4
    return view


def read_only(array):
    copy = array.copy()
    copy.setflags(write=False)
    return copy


def each(change):
    return lambda batch: StepBatch(**{field: change(getattr(batch, field)) for field in FIELDS})


LAYOUTS = {
    "aligned": aligned,
    "misaligned": each(shifted),
    "read-only": each(read_only),
    "in Fortran's order": each(np.asfortranarray),
    "some rows of another": lambda batch: each(lambda array: array[16:48])(aligned(batch)),
    "every other row": lambda batch: each(lambda array: array[::2])(aligned(batch)),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    model = SavedModel(VersionKey("sums", 1), export_sums(models))
    model.compile(64, 4)
    model.compile(32, 4)
    return model


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("steps", [3, 4], ids=["plain", "compiled"])
def test_a_batch_gives_the_same_wherever_it_lies_and_is_not_written(model, layout, steps):
    batch = LAYOUTS[layout](random_batch(64, steps))
    before = {field: getattr(batch, field).copy() for field in FIELDS}
    assert model.is_compiled(*batch.inputs.shape[:2]) == (steps == 4)
    assert_close(model.run(batch), expected(batch))
    for field in FIELDS:
        np.testing.assert_array_equal(getattr(batch, field), before[field])


@pytest.mark.parametrize("steps", [3, 4], ids=["plain", "compiled"])
def test_results_outlive_their_batches(model, steps):
    kept = []
    for seed in range(50):
        batch = aligned(random_batch(64, steps, seed))
        batch.lengths[:] = seed % 2  # where nothing is stepped, a graph may hand its inputs through
        kept.append((model.run(batch), expected(batch)))
        del batch
    for result, wanted in kept:
        assert_close(result, wanted)


def test_an_empty_batch_is_of_zeros_but_for_its_states():
    for rows, steps in ((1, 1), (3, 5), (64, 16)):
        batch = empty_batch(rows, steps, WIDTH, 7)
        assert (batch.inputs.shape, batch.state.shape) == ((rows, steps, WIDTH), (rows, 7))
        assert (batch.lengths.shape, batch.reset.shape) == ((rows,), (rows,))
        assert not any(getattr(batch, field).any() for field in ("inputs", "lengths", "reset"))
        for number, field in enumerate(FIELDS):
            getattr(batch, field)[...] = number
        for number, field in enumerate(FIELDS):  # none lies on another
            assert (getattr(batch, field) == getattr(batch, field).dtype.type(number)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("steps", [3, 4], ids=["plain", "compiled"])
def test_a_result_says_whether_all_of_it_is_finite(model, steps, value):
    batch = aligned(random_batch(64, steps))
    assert model.run(batch).finite
    batch.reset[63] = False
    batch.state[63, WIDTH - 1] = value
    assert not model.run(batch).finite


def next_batch(before, steps, seed):
    """Random inputs for the states of a result; by themselves, and with the states as the model has them."""
    batch = random_batch(64, steps, seed)
    batch.reset[:] = False
    native = batch_of(before.state, before.native, steps, WIDTH)
    native.inputs[:], native.lengths[:] = batch.inputs, batch.lengths
    alone = aligned(StepBatch(batch.inputs, batch.lengths, batch.reset, before.state))
    return native, alone


@pytest.mark.parametrize("steps", [3, 4], ids=["plain", "compiled"])
def test_states_go_back_in_as_the_model_has_them_and_stay_what_they_are(model, steps):
    results = [model.run(aligned(random_batch(64, steps)))]
    kept = [results[0].state.copy()]
    for seed in range(20):
        native, alone = next_batch(results[-1], steps, seed)
        assert native.native is not None
        assert native.state is results[-1].state
        result = model.run(native)
        np.testing.assert_array_equal(result.outputs, (wanted := model.run(alone)).outputs)
        np.testing.assert_array_equal(result.state, wanted.state)
        results.append(result)
        kept.append(result.state.copy())
    for result, state in zip(results, kept, strict=True):
        np.testing.assert_array_equal(result.state, state)


def test_states_that_lie_in_a_gpu_s_memory_are_not_kept_there(model, monkeypatch):
    monkeypatch.setattr(model, "on_cpu", False)
    assert model.run(aligned(random_batch(64, 4))).native is None


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("steps", [3, 4], ids=["plain", "compiled"])
def test_a_batch_that_comes_again_is_read_again(model, monkeypatch, steps, on_cpu):
    monkeypatch.setattr(model, "on_cpu", on_cpu)
    again = empty_batch(1, steps, WIDTH, WIDTH, again=True)
    made = []
    monkeypatch.setattr(model, "_from_dlpack", lambda capsule, make=model._from_dlpack: made.append(1) or make(capsule))
    for seed in range(5):
        batch = random_batch(1, steps, seed)
        for field in FIELDS:
            getattr(again, field)[...] = getattr(batch, field)
        came, wanted = model.run(again), model.run(batch._replace(**{f: getattr(batch, f).copy() for f in FIELDS}))
        np.testing.assert_array_equal(came.outputs, wanted.outputs)
        np.testing.assert_array_equal(came.state, wanted.state)
        made_for_it = len(made)
    other = model.run(aligned(random_batch(1, steps, 9)))
    model.run(again)
    # On a GPU TensorFlow may keep what it has copied there of a tensor: there each time has tensors of its own.
    assert (len(made) - made_for_it == 4) == on_cpu
    assert other.finite
