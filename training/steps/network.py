"""What an update reads and changes, and the arithmetic that is the same on every backend."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import keras
from keras import ops

# A distribution strategy of TensorFlow or a distribution of Keras; None: one device.
Spread: TypeAlias = Any


class Network(NamedTuple):
    """A network in training.

    Attributes:
        logits: from ``[batch, time, input_dim]`` to logits ``[batch, time, bits]``.
        weights: what is trained.
        average: the running average of each of the weights.
        decay: of that average, in an update.
        optimizer: built for the weights.
        clip_norm: the greatest global norm of a gradient.
    """

    logits: keras.Sequential
    weights: Sequence[keras.Variable]
    average: Sequence[keras.Variable]
    decay: float
    optimizer: keras.optimizers.Optimizer
    clip_norm: keras.Variable


class Updates(Protocol):
    """Updates one after the other."""

    def __call__(self, inputs: Any, targets: Any, masks: Any) -> tuple[float, float, float]:
        """One update for each batch, in place.

        Each of them is a step of the optimizer on the loss summed over bits and averaged over the sequences, its
        gradient clipped.

        Args:
            inputs: ``[updates, batch, time, input_dim]``.
            targets: ``[updates, batch, time, bits]``.
            masks: ``[updates, batch, time]``.

        Returns:
            Sums over all of it: the loss in nats, the wrong bits, the steps that were asked for.
        """
        ...


def masked_sums(logits: Any, targets: Any, mask: Any) -> tuple[Any, Any]:
    """The loss in nats and the number of wrong bits, summed where the mask is 1.

    Args:
        logits: ``[batch, time, bits]``.
        targets: ``[batch, time, bits]``.
        mask: ``[batch, time]``.
    """
    # As tf.nn.sigmoid_cross_entropy_with_logits: no exponential overflows.
    loss = ops.maximum(logits, 0.0) - logits * targets + ops.log1p(ops.exp(-ops.abs(logits)))
    wrong = ops.cast(ops.not_equal(logits > 0, targets > 0.5), "float32")
    return ops.sum(ops.sum(loss, -1) * mask), ops.sum(ops.sum(wrong, -1) * mask)


def clip_by_global_norm(gradients: Sequence[Any], limit: Any) -> list[Any]:
    """The gradients, scaled down together so that the norm of all of them is at most ``limit``."""
    norm = ops.sqrt(sum(ops.sum(ops.square(gradient)) for gradient in gradients))
    scale = limit / ops.maximum(norm, limit)
    return [gradient * scale for gradient in gradients]


def forward(logits: keras.Sequential, *, compiled: bool) -> Callable[[Any], Any]:
    """The network without noise, from ``[batch, time, input_dim]`` to logits ``[batch, time, bits]``, as a function.

    Args:
        logits: the network.
        compiled: whether it is compiled, once for each shape; else one graph serves every shape where there are graphs.
    """
    if keras.backend.backend() == "jax":
        import jax

        run = jax.jit(lambda weights, others, inputs: logits.stateless_call(weights, others, inputs, training=False)[0])
        parts = (logits.trainable_variables, logits.non_trainable_variables)

        def function(inputs: Any) -> Any:
            return run(*([variable.value for variable in part] for part in parts), inputs)

        return function
    infer: Callable[[Any], Any] = functools.partial(logits, training=False)
    if keras.backend.backend() == "torch":
        import torch

        infer = torch.no_grad()(infer)
    else:
        import tensorflow as tf

        signature = None if compiled else [tf.TensorSpec([None, None, logits.input_shape[-1]], tf.float32)]
        infer = tf.function(infer, input_signature=signature, jit_compile=compiled)
    return infer
