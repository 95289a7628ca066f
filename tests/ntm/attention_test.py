"""The gradient that is written out, against the one that the backend finds for the functions it stands for."""

import numpy as np
import pytest
from keras import ops

from ntm import NTMCell, attention, parameters
from tests.ntm.support import BACKEND, gradients, numpy

BATCH, SLOTS, DEPTH = 3, 7, 4

pytestmark = pytest.mark.skipif(BACKEND == "torch", reason="it is not for PyTorch, which leaves gradients to itself")


def values_for(cell, seed=0):
    """A memory, weightings and raw head parameters, of float64."""
    rng = np.random.default_rng(seed)
    reading, writing = (rng.dirichlet(np.ones(SLOTS), (BATCH, heads)) for heads in (cell.read_heads, cell.write_heads))
    return rng.normal(size=(BATCH, DEPTH, SLOTS)), reading, writing, rng.normal(size=(BATCH, cell.parameters_width))


def tensors(values):
    return [ops.convert_to_tensor(value) for value in values]


def plainly(cell, tape, reading, writing, raw):
    return cell._attend(raw, tape, reading, writing)


def written_out(cell, tape, reading, writing, raw):
    return attention.attend(tape, reading, writing, parameters.split(raw, cell.head_parameters))


@pytest.mark.parametrize(("read_heads", "write_heads", "shift_range"), [(1, 1, 3), (2, 1, 4), (3, 2, 2)])
def test_it_is_the_same(read_heads, write_heads, shift_range):
    cell = NTMCell(2, SLOTS, DEPTH, shift_range, None, read_heads, write_heads, dtype="float64")
    values = values_for(cell)
    # Every output has a part in the loss, each place its own.
    shares = [np.random.default_rng(1).normal(size=numpy(output).shape) for output in plainly(cell, *tensors(values))]
    results = {}
    for attend in (plainly, written_out):

        def loss(tensors, attend=attend):
            return sum(ops.sum(output * share) for output, share in zip(attend(cell, *tensors), shares, strict=True))

        results[attend] = numpy(list(attend(cell, *tensors(values)))) + gradients(loss, values)
    # On JAX there is float32 in between, if only in Keras's tanh.
    tolerance = 1e-4 if BACKEND == "jax" else 1e-11
    for expected, found in zip(results[plainly], results[written_out], strict=True):
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)


def test_a_weight_that_sharpening_holds_up_gets_no_gradient():
    cell = NTMCell(2, SLOTS, DEPTH, dtype="float64")
    tape, reading, _, raw = values_for(cell)
    one_hot = np.zeros_like(reading)
    one_hot[..., 2] = 1.0
    # Gate shut: the previous focus stays, in one slot and its neighbours.
    raw[:, 2 * DEPTH + 2 : 2 * DEPTH + 4] = -1e4
    values = (tape, one_hot, one_hot, raw)

    def loss(tensors, attend):
        return ops.sum(ops.square(attend(cell, *tensors)[1]))

    plain, written = (
        gradients(lambda tensors, attend=attend: loss(tensors, attend), values) for attend in (plainly, written_out)
    )
    for expected, found in zip(plain, written, strict=True):
        assert np.isfinite(found).all()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_a_cell_in_training_uses_it_where_it_is_asked_to(monkeypatch):
    cell, calls, attend = NTMCell(2, SLOTS, DEPTH), [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *arguments: calls.append(1) or attend(*arguments))
    tape, reading, writing, raw = tensors([value.astype("float32") for value in values_for(cell)])
    cell._attend_in_training()(raw, tape, reading, writing)
    assert not calls
    with attention.written_out():
        found = cell._attend_in_training()(raw, tape, reading, writing)
    assert len(calls) == 1
    assert not attention.is_written_out()
    for expected, part in zip(plainly(cell, tape, reading, writing, raw), found, strict=True):
        np.testing.assert_allclose(numpy(part), numpy(expected), rtol=1e-5, atol=1e-6)
