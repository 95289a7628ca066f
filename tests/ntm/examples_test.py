"""The ancestor's two examples, run."""

import runpy
from pathlib import Path

import keras
import numpy as np

from tests.ntm.support import largest_difference, numpy

EXAMPLES = Path(__file__).parents[2] / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_the_first_example_builds_trains_and_saves(tmp_path):
    dense = example("ancestor_dense")
    model, (inputs, targets) = dense["build"](), dense["copy_sequences"](batch=10, length=2)
    assert model.input_shape == (None, None, 10)
    assert model.output_shape == (None, None, 8)
    first = model.train_on_batch(inputs, targets)[0]
    assert np.isfinite(first)
    for _ in range(3):
        last = model.train_on_batch(inputs, targets)[0]
    assert last < first
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(numpy(loaded(inputs)), numpy(model(inputs)))


def test_the_double_lstm_keeps_its_state_from_step_to_step():
    double, dense = example("ancestor_double_lstm"), example("ancestor_dense")
    model, (inputs, _) = double["build"](), dense["copy_sequences"](batch=4, length=2)
    layer = model.layers[0]
    names = [component.name for component in layer.cell.state_layout if component.name.startswith("controller")]
    assert names == [f"controller/{cell}/{part}" for cell in (0, 1) for part in ("hidden", "carry")]
    # From the same memory, reads and weightings but other LSTM states, another output follows: the state is alive.
    states = layer.get_initial_state(4)
    changed = [*states[:4], *(state + 0.5 for state in states[4:])]
    assert largest_difference([layer(inputs, initial_state=changed)], [layer(inputs)]) > 1e-3
    output, after = layer.cell(inputs[:, 0], states)
    assert output.shape == (4, 8)
    assert all(largest_difference([new], [old]) > 1e-4 for new, old in zip(after[4:], states[4:], strict=True))
