"""Many updates in one compiled call, and what a look at the network costs."""

from collections.abc import Sequence
from typing import NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from training.config import Recipe
from training.models import logits_model
from training.steps import Network, Spread, make_updates
from training.tasks import Batch


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
        spread: how batches are spread over devices; then all of this is made in its scope.
    """

    def __init__(
        self, model: keras.Sequential, recipe: Recipe, noise: keras.Variable, *, spread: Spread = None
    ) -> None:
        self.model = model
        self.recipe = recipe
        self.noise = noise
        self._weights = model.trainable_variables
        # As floats: a whole number would make a variable of integers, or be refused.
        self.clip_norm = keras.Variable(float(recipe.clip_norm), trainable=False, name="clip_norm")
        self._average = [_average_of(weight, f"average_{i}") for i, weight in enumerate(self._weights)]
        rate = float(recipe.learning_rate)
        self.optimizer = keras.optimizers.Adam(rate, beta_2=recipe.beta_2, epsilon=recipe.epsilon)
        self.optimizer.build(self._weights)
        network = Network(
            logits_model(model), self._weights, self._average, recipe.average, self.optimizer, self.clip_norm
        )
        self._updates = make_updates(network, compiled=recipe.compiled, spread=spread)

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
                variable.assign(keras.ops.zeros(variable.shape, variable.dtype))

    def take(self, other: "Trainer") -> None:
        """Goes on where another one stands, whose model has the same weights."""
        for variable, value in zip(self.variables, other.variables, strict=True):
            variable.assign(value)

    def run(self, batches: Sequence[Batch], rates: Rates) -> Progress:
        """One update for each batch; all batches have one shape, and every call as many of them."""
        self.optimizer.learning_rate.assign(rates.learning_rate)
        self.clip_norm.assign(rates.clip_norm)
        self.noise.assign(rates.noise)
        loss, wrong, asked = self._updates(*(np.stack(arrays) for arrays in zip(*batches, strict=True)))
        bits = asked * batches[0].targets.shape[-1]
        sequences = len(batches) * len(batches[0].mask)
        return Progress(loss / bits, loss / np.log(2) / sequences, wrong / sequences)

    @property
    def finite(self) -> bool:
        """Whether every weight is a number, and was in the updates that the average remembers."""
        return all(np.isfinite(value).all() for value in self.average)


def _average_of(weight: keras.Variable, name: str) -> keras.Variable:
    """A running average that begins at the weight; a copy, because PyTorch would share the memory of the two."""
    start = np.array(keras.ops.convert_to_numpy(weight))
    return keras.Variable(start, trainable=False, name=name, aggregation="only_first_replica")
