"""The first example of ntm_keras, the layer that this one succeeds, as it stood in its README.

Changed only where Keras 3 changed: a model's name is given when it is made, `Adam` says ``learning_rate``, and
``sample_weight_mode`` is gone.
"""

import numpy as np
from keras.models import Sequential
from keras.optimizers import Adam

from ntm import NeuralTuringMachine as NTM  # noqa: N817 - as the README had it

input_dim, output_dim, learning_rate, clipnorm = 10, 8, 5e-4, 10


def build():
    """The copy model of the README: a single dense layer as controller."""
    model = Sequential(name="NTM_-_dense")
    ntm = NTM(
        output_dim,
        n_slots=50,
        m_depth=20,
        shift_range=3,
        controller_model=None,
        return_sequences=True,
        input_shape=(None, input_dim),
        batch_size=100,
    )
    model.add(ntm)
    sgd = Adam(learning_rate=learning_rate, clipnorm=clipnorm)
    model.compile(loss="binary_crossentropy", optimizer=sgd, metrics=["binary_accuracy"])
    return model


def copy_sequences(batch=100, length=5, seed=0):
    """Start flag, bits, end flag, silence; the bits are to be repeated in the silence: ``2 * length + 2`` steps."""
    bits = np.random.default_rng(seed).integers(0, 2, (batch, length, output_dim))
    inputs = np.zeros((batch, 2 * length + 2, input_dim), "float32")
    targets = np.zeros((batch, 2 * length + 2, output_dim), "float32")
    inputs[:, 0, output_dim] = inputs[:, length + 1, output_dim + 1] = 1
    inputs[:, 1 : length + 1, :output_dim] = targets[:, length + 2 :] = bits
    return inputs, targets


if __name__ == "__main__":
    model = build()
    model.summary()
    model.fit(*copy_sequences(), batch_size=100, epochs=5)
