"""Many updates in one compiled call, and what a look at the network costs."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from training.config import Recipe
from training.models import logits_model
from training.tasks import Batch

if keras.backend.backend() == "tensorflow":
    import tensorflow as tf


class Rates(NamedTuple):
    """What a schedule changes between two calls."""

    learning_rate: float
    clip_norm: float
    noise: float


class Progress(NamedTuple):
    """What a few updates gave.

    Attributes:
        nats_per_bit: mean loss of an asked-for bit.
        bits_per_sequence: mean loss of a sequence, in bits.
        wrong_bits: mean number of wrong bits in a sequence.
    """

    nats_per_bit: float
    bits_per_sequence: float
    wrong_bits: float


class Trainer:
    """A network with its optimizer, the running average of its weights and its schedule's variables.

    Args:
        model: as `training.models.build_model` makes it; its noise may be ``noise``.
        recipe: the optimizer's settings.
        noise: the variable that the network's noise was made with.

    Raises:
        RuntimeError: Keras runs on another backend than TensorFlow.
    """

    def __init__(self, model: keras.Sequential, recipe: Recipe, noise: keras.Variable) -> None:
        if keras.backend.backend() != "tensorflow":
            raise RuntimeError(f"training runs on Keras's tensorflow backend; it is {keras.backend.backend()!r} now")
        self.model = model
        self.recipe = recipe
        self.noise = noise
        self._logits = logits_model(model)
        self._weights = model.trainable_variables
        self.clip_norm = keras.Variable(recipe.clip_norm, trainable=False, name="clip_norm")
        self._average = [keras.Variable(w, trainable=False, name=f"average_{i}") for i, w in enumerate(self._weights)]
        self.optimizer = keras.optimizers.Adam(recipe.learning_rate, beta_2=recipe.beta_2, epsilon=recipe.epsilon)
        self.optimizer.build(self._weights)
        self._updates = tf.function(self._run_updates, jit_compile=recipe.compiled)

    @property
    def variables(self) -> list[keras.Variable]:
        """All that changes in training: what a checkpoint has to hold."""
        random = [v for v in self.model.non_trainable_variables if v is not self.noise]
        return [*self._weights, *self._average, *self.optimizer.variables, *random]

    @property
    def average(self) -> list[npt.NDArray[np.float32]]:
        """The running average of the trainable weights, in their order."""
        return [np.asarray(keras.ops.convert_to_numpy(value)) for value in self._average]

    def restart(self, model: keras.Sequential) -> None:
        """Takes the weights and the seeds of a new model of the same form, and forgets everything else."""
        for variable, average, new in zip(self._weights, self._average, model.trainable_variables, strict=True):
            variable.assign(new)
            average.assign(new)
        for variable, new in zip(self.model.non_trainable_variables, model.non_trainable_variables, strict=True):
            if variable is not self.noise:
                variable.assign(new)
        for variable in self.optimizer.variables:
            if variable is not self.optimizer.learning_rate:
                variable.assign(keras.ops.zeros_like(variable))

    def run(self, batches: Sequence[Batch], rates: Rates) -> Progress:
        """One update for each batch; all batches have one shape, and every call as many of them."""
        self.optimizer.learning_rate.assign(rates.learning_rate)
        self.clip_norm.assign(rates.clip_norm)
        self.noise.assign(rates.noise)
        stacked = [np.stack(arrays) for arrays in zip(*batches, strict=True)]
        loss, wrong, asked = (float(value) for value in self._updates(*map(tf.convert_to_tensor, stacked)))
        bits = asked * batches[0].targets.shape[-1]
        sequences = len(batches) * len(batches[0].mask)
        return Progress(loss / bits, loss / np.log(2) / sequences, wrong / sequences)

    def _run_updates(self, inputs: Any, targets: Any, masks: Any) -> Any:
        """Sums over ``[updates, batch, time, ...]``: the loss in nats, the wrong bits, the asked-for steps."""
        totals = (tf.constant(0.0), tf.constant(0.0), tf.constant(0.0))

        def body(index: Any, sums: Any) -> Any:
            new = self._update(inputs[index], targets[index], masks[index])
            return index + 1, tuple(a + b for a, b in zip(sums, new, strict=True))

        def unfinished(index: Any, sums: Any) -> Any:
            return index < inputs.shape[0]

        return tf.while_loop(unfinished, body, (tf.constant(0), totals))[1]

    def _update(self, inputs: Any, targets: Any, mask: Any) -> Any:
        """One step of Adam on the sum over bits, averaged over the sequences, with the global norm clipped."""
        with tf.GradientTape() as tape:
            logits = self._logits(inputs, training=True)
            loss, wrong = masked_sums(logits, targets, mask)
            objective = loss / inputs.shape[0]
        gradients, _ = tf.clip_by_global_norm(
            tape.gradient(objective, [w.value for w in self._weights]), tf.convert_to_tensor(self.clip_norm)
        )
        self.optimizer.apply(gradients, self._weights)
        for average, weight in zip(self._average, self._weights, strict=True):
            average.assign(self.recipe.average * average + (1.0 - self.recipe.average) * weight)
        return loss, wrong, tf.reduce_sum(mask)


def masked_sums(logits: Any, targets: Any, mask: Any) -> tuple[Any, Any]:
    """The loss in nats and the number of wrong bits, summed where the mask is 1.

    Args:
        logits: ``[batch, time, bits]``.
        targets: ``[batch, time, bits]``.
        mask: ``[batch, time]``.
    """
    loss = tf.nn.sigmoid_cross_entropy_with_logits(labels=targets, logits=logits)
    wrong = tf.cast((logits > 0) != (targets > 0.5), tf.float32)
    return tf.reduce_sum(tf.reduce_sum(loss, -1) * mask), tf.reduce_sum(tf.reduce_sum(wrong, -1) * mask)
