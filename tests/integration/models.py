"""The models that whole gateways are tested with, and what they give on whole sequences."""

from pathlib import Path

import numpy as np

INPUT_DIM, OUTPUT_DIM = 10, 8
# Twice the unit scale, but for the NTM with an LSTM: that one would be chaotic then, and differ from itself by 1e-3
# after some hundred time steps as soon as the batch size changes the order of a sum.
SCALES = {"ntm-dense": 2.0, "ntm-lstm": 1.0, "lstm": 2.0}


def make(kind):
    """A model with weights of unit scale: what it has seen shows in what it says."""
    import keras

    from ntm import NeuralTuringMachine

    keras.utils.set_random_seed(7)
    small = {"n_slots": 24, "m_depth": 6, "shift_range": 3, "return_sequences": True}
    layers = {
        "ntm-dense": [NeuralTuringMachine(OUTPUT_DIM, controller_units=16, **small)],
        "ntm-lstm": [
            NeuralTuringMachine(
                OUTPUT_DIM,
                controller_model=keras.layers.LSTMCell(16),
                project_controller=True,
                read_heads=2,
                **small,
            )
        ],
        "lstm": [keras.layers.LSTM(12, return_sequences=True) for _ in range(3)]
        + [keras.layers.Dense(OUTPUT_DIM, activation="sigmoid")],
    }
    model = keras.Sequential([keras.Input((None, INPUT_DIM)), *layers[kind]])
    rng = np.random.default_rng(7)
    for weight in model.trainable_weights:
        scale = 1.0 if len(weight.shape) < 2 else SCALES[kind] / np.sqrt(weight.shape[0])
        weight.assign(rng.normal(size=weight.shape) * scale)
    return model


KINDS = ("ntm-dense", "ntm-lstm", "lstm")


def export_all(directory):
    from training.export import export_model

    for kind in KINDS:
        export_model(make(kind), directory, name=kind, task="none: random weights")


class Whole:
    """``serving_default`` of an exported version, on whole sequences."""

    def __init__(self, path: Path) -> None:
        import tensorflow as tf

        self._loaded = tf.saved_model.load(str(path))
        self._run = self._loaded.signatures["serving_default"]
        self._constant = tf.constant

    def __call__(self, inputs):
        return self._run(inputs=self._constant(inputs))["outputs"].numpy()

    def tolerance(self):
        """1e-5, or ten times what ``serving_default`` itself differs by between batches of 1 and of 64."""
        inputs = np.random.default_rng(3).normal(size=(64, 40, INPUT_DIM)).astype(np.float32)
        together = self(inputs)
        alone = np.concatenate([self(inputs[row : row + 1]) for row in range(0, 64, 8)])
        return max(1e-5, 10 * float(np.abs(together[::8] - alone).max()))
