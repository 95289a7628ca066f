"""The layer against plain loops written from the paper."""

import keras
import numpy as np
import pytest

from ntm import NeuralTuringMachine
from tests.ntm.oracle import Machine
from tests.ntm.support import numpy, randomise, sequences


def oracle_of(cell):
    weights = {
        layer.name: (numpy(layer.kernel).tolist(), numpy(layer.bias).tolist())
        for layer in (cell.controller.stages[0].layer, cell.parameter_projection, cell.output_projection)
    }
    weights["first_weighting_logits"] = numpy(cell.first_weighting_logits).tolist()
    return Machine(
        weights,
        slots=cell.n_slots,
        depth=cell.m_depth,
        shift_range=cell.shift_range,
        read_heads=cell.read_heads,
        write_heads=cell.write_heads,
    )


@pytest.mark.parametrize(
    ("read_heads", "write_heads", "shift_range", "slots"), [(1, 1, 3, 7), (2, 1, 4, 9), (3, 2, 2, 6), (1, 2, 5, 8)]
)
def test_outputs_and_every_state_are_those_of_the_paper(read_heads, write_heads, shift_range, slots):
    layer = NeuralTuringMachine(
        3,
        n_slots=slots,
        m_depth=5,
        shift_range=shift_range,
        read_heads=read_heads,
        write_heads=write_heads,
        controller_units=6,
        return_sequences=True,
        return_state=True,
        dtype="float64",
    )
    layer.build((None, None, 4))
    randomise(layer, scale=3.0)
    batch = sequences(batch=2, time=12, dtype="float64")
    outputs, memory, reads, read_weightings, write_weightings = numpy(layer(batch))
    for row, sequence in enumerate(batch.tolist()):
        expected = Machine.run(oracle_of(layer.cell), sequence)
        weightings = np.concatenate([read_weightings[row].reshape(-1, slots), write_weightings[row].reshape(-1, slots)])
        ours = [outputs[row], memory[row].reshape(5, slots).T, reads[row].reshape(-1, 5), weightings]
        for mine, theirs in zip(ours, expected, strict=True):
            np.testing.assert_allclose(mine, np.array(theirs), atol=1e-12 if mine.dtype == np.float64 else 1e-4, rtol=0)
        # A control: the memory has been written and the focus has moved, so the agreement says something.
        assert np.abs(ours[1]).max() > 0.1
        assert np.abs(np.diff(ours[0], axis=0)).max() > 0.01


def test_the_oracle_is_run_in_float64_where_the_backend_can():
    if keras.backend.backend() != "jax":
        assert str(NeuralTuringMachine(3, dtype="float64").cell.state_dtype) == "float64"
