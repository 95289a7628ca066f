"""What the layer's tests share: controllers of every kind, weights that make the memory matter, gradients anywhere."""

import keras
import numpy as np
from keras import ops

BACKEND = keras.backend.backend()
INPUT_DIM, OUTPUT_DIM, SLOTS, DEPTH = 4, 3, 7, 5


def functional_controller(width):
    inputs = keras.Input((width,))
    hidden = keras.layers.Dense(6, "tanh")(inputs)
    return keras.Model(inputs, keras.layers.Concatenate()([hidden, keras.layers.Dense(3, "relu")(inputs)]))


# The six kinds of controller, by the width of their inputs.
CONTROLLERS = {
    "dense": lambda _width: None,
    "functional": functional_controller,
    "cell": lambda _width: keras.layers.LSTMCell(6),
    "sequential": lambda _width: keras.Sequential([keras.layers.GRU(6, return_sequences=True), keras.layers.Dense(5)]),
    "stacked": lambda _width: keras.layers.StackedRNNCells([keras.layers.LSTMCell(6), keras.layers.SimpleRNNCell(5)]),
    "list": lambda _width: [keras.layers.SimpleRNN(6), keras.layers.Dropout(0.5), keras.layers.LSTM(4)],
}


def controller_options(kind, read_heads=1):
    model = CONTROLLERS[kind](INPUT_DIM + read_heads * DEPTH)
    return {"controller_model": model, "project_controller": model is not None}


def randomise(layer, seed=0, scale=1.0):
    """Weights of about unit scale: an untrained NTM on a constant memory hardly depends on what it has seen."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:
        fan_in = weight.shape[0] if len(weight.shape) > 1 else 1
        weight.assign(rng.normal(0, scale / np.sqrt(fan_in), weight.shape))


def sequences(batch=3, time=6, dim=INPUT_DIM, seed=1, dtype="float32"):
    return np.random.default_rng(seed).normal(size=(batch, time, dim)).astype(dtype)


def numpy(tensors):
    """A tensor or a list or tuple of tensors, as NumPy."""
    if isinstance(tensors, (list, tuple)):
        return [numpy(tensor) for tensor in tensors]
    return ops.convert_to_numpy(tensors)


def largest_difference(ours, theirs):
    return max(float(np.max(np.abs(a - b))) for a, b in zip(numpy(ours), numpy(theirs), strict=True))


def compiled(function):
    """The function, compiled where the backend has a compiler that needs no extra set-up."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        return tf.function(function, jit_compile=True)
    if BACKEND == "jax":
        import jax

        return jax.jit(function)
    return function


def gradients(loss, values):
    """Gradients of the scalar ``loss(list of tensors)`` at the arrays ``values``, as NumPy."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        tensors = [tf.constant(value) for value in values]
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            result = loss(tensors)
        return numpy(tape.gradient(result, tensors))
    if BACKEND == "jax":
        import jax

        return numpy(list(jax.grad(loss)([jax.numpy.asarray(value) for value in values])))
    import torch

    device = ops.convert_to_tensor(0.0).device  # where Keras puts its own: a GPU, if there is one
    tensors = [torch.tensor(value, requires_grad=True, device=device) for value in values]
    return numpy(list(torch.autograd.grad(loss(tensors), tensors)))


def weight_gradients(layer, loss):
    """Gradients of ``loss()`` with respect to the layer's weights, as NumPy."""

    def with_weights(values):
        with keras.StatelessScope(state_mapping=list(zip(layer.trainable_weights, values, strict=True))):
            return loss()

    return gradients(with_weights, numpy([weight.value for weight in layer.trainable_weights]))
