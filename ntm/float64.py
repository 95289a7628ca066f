"""Float64 that stays float64 on every backend, where Keras has the detour over float32.

`ops.matmul`, and with it `keras.layers.Dense`, rounds float64 to float32 on PyTorch; `ops.tanh` does on JAX. An NTM
amplifies what is rounded: after twelve steps of a small one with large weights, 1e-7 has become 2e-6.
"""

import keras
from keras import ops


class Float64Dense(keras.layers.Dense):
    """`keras.layers.Dense` without the detour."""

    def call(self, inputs, training=None):
        """``activation(inputs @ kernel + bias)``: ``[batch, width]`` to ``[batch, units]``."""
        del training
        return self.activation(inputs @ ops.convert_to_tensor(self.kernel) + ops.convert_to_tensor(self.bias))


def dense(units, activation=None, *, dtype, name):
    """A dense layer whose results are as exact as its dtype.

    Args:
        units: the width of its output.
        activation: as `keras.layers.Dense` takes it.
        dtype: a `keras.DTypePolicy`.
        name: the layer's name.

    Returns:
        A `keras.layers.Dense`; in float64 a `Float64Dense`, which Keras does not quantize.
    """
    kind = Float64Dense if dtype.compute_dtype == "float64" else keras.layers.Dense
    return kind(units, activation, dtype=dtype, name=name)


def tanh(x):
    """`keras.activations.tanh`, as exact as the dtype of ``x``, of any shape."""
    if keras.backend.standardize_dtype(x.dtype) == "float64":
        return 2.0 * keras.activations.sigmoid(2.0 * x) - 1.0
    return keras.activations.tanh(x)
