"""Inputs and weights of 1e4, for ten thousand steps: nothing overflows, and every weighting stays one."""

import keras
import numpy as np
import pytest
from keras import ops

from ntm import NeuralTuringMachine
from tests.ntm.support import BACKEND, compiled, numpy, randomise, sequences, weight_gradients

SLOTS, STEPS = 16, 10_000


def check(layer, states, tolerance):
    for component, state in zip(layer.cell.state_layout, states, strict=True):
        assert np.isfinite(state).all(), component.name
        if component.name.endswith("weightings"):
            sums = state.reshape(-1, *component.shape).sum(-1)
            np.testing.assert_allclose(sums, 1, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [20.0, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 1e-2)])
def test_ten_thousand_steps_stay_finite(dtype, tolerance, clip):
    layer = NeuralTuringMachine(
        3, SLOTS, 4, read_heads=2, controller_units=5, parameter_clip=clip, return_state=True, dtype=dtype
    )
    layer.build((None, None, 4))
    randomise(layer, scale=1e4)
    run = compiled(lambda batch, states: layer(batch, initial_state=states))
    states = layer.get_initial_state(2)
    for chunk in range(10):
        batch = sequences(2, STEPS // 10, seed=chunk) * np.float32(1e4)
        output, *states = run(ops.convert_to_tensor(batch, dtype=dtype), states)
        assert np.isfinite(numpy(ops.cast(output, "float32"))).all()
        check(layer, numpy(states), tolerance)


@pytest.mark.parametrize("clip", [20.0, None])
def test_gradients_of_extreme_weights_are_finite(clip):
    layer = NeuralTuringMachine(3, SLOTS, 4, controller_units=5, parameter_clip=clip)
    layer.build((None, None, 4))
    randomise(layer, scale=1e4)
    found = weight_gradients(layer, lambda: ops.sum(layer(sequences(2, 20) * 1e4, training=True)))
    assert all(np.isfinite(gradient).all() for gradient in found)


@pytest.mark.skipif(BACKEND == "jax", reason="JAX flushes numbers that small to zero on its own")
def test_an_untrained_memory_can_be_addressed_by_content():
    cell = NeuralTuringMachine(3, SLOTS, 4).cell
    memory = numpy(cell.get_initial_state(1)[0])
    assert keras.backend.standardize_dtype(memory.dtype) == "float32"
    assert (memory > 0).all()
