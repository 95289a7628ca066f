"""The same weights and inputs give the same outputs and states on every backend (see scripts/test_backends.sh)."""

import os
from pathlib import Path

import numpy as np
import pytest

from ntm import NeuralTuringMachine
from tests.ntm.support import CONTROLLERS, INPUT_DIM, controller_options, numpy, randomise, sequences

REFERENCE = os.environ.get("NTM_REFERENCE")
MASK = np.array([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [1, 1, 0, 1, 1, 1]], bool)


def results(kind):
    """Every array that the backends have to agree on: weights and inputs (from NumPy), outputs and states."""
    layer = NeuralTuringMachine(
        3, 7, 5, read_heads=2, write_heads=2, return_sequences=True, return_state=True, **controller_options(kind, 2)
    )
    layer.build((None, None, INPUT_DIM))
    randomise(layer, scale=2.0)
    arrays = {"inputs": sequences()}
    arrays |= {f"weight_{index}": numpy(weight.value) for index, weight in enumerate(layer.trainable_weights)}
    for name, mask in (("plain", None), ("masked", MASK)):
        arrays |= {f"{name}_{index}": part for index, part in enumerate(numpy(layer(sequences(), mask=mask)))}
    return {f"{kind}/{name}": array for name, array in arrays.items()}


@pytest.mark.skipif(REFERENCE is None, reason="scripts/test_backends.sh names the file that the backends share")
def test_outputs_and_every_state_are_those_of_the_first_backend():
    ours = {name: array for kind in CONTROLLERS for name, array in results(kind).items()}
    if not Path(REFERENCE).exists():
        np.savez(REFERENCE, **ours)
    with np.load(REFERENCE) as reference:
        assert set(ours) == set(reference.files)
        for name, array in ours.items():
            np.testing.assert_allclose(array, reference[name], atol=1e-5, rtol=0, err_msg=name)
