"""How well a model answers: wrong bits and bits of loss, sequence by sequence."""

from typing import Any, NamedTuple

import keras
import numpy as np
import numpy.typing as npt

from training.models import logits_model
from training.results import Row
from training.steps import forward
from training.tasks import Batch, Task
from training.tasks.base import FloatArray

# Sequences in one call: more do not run faster, and take more memory.
_SLICE = 64


class Answers(NamedTuple):
    """One entry for each sequence.

    Attributes:
        wrong_bits: bits that were wrong where the mask asks for them.
        loss_bits: loss of the sequence, in bits.
        asked_bits: bits that were asked for.
    """

    wrong_bits: npt.NDArray[np.float64]
    loss_bits: npt.NDArray[np.float64]
    asked_bits: npt.NDArray[np.float64]


def shortfall(task: Task, batch: Batch, answers: Answers) -> float:
    """How far the answers are from those of a solved network, for which this is zero: lower is better.

    The mean number of wrong bits of a sequence. Where no network can know the bits, because the task has an optimal
    predictor, it is what the mean loss, in bits, lies above 1.01 times that predictor's.
    """
    optimal_bits = getattr(task, "optimal_bits", None)
    if optimal_bits is None:
        return float(answers.wrong_bits.mean())
    return max(0.0, float(answers.loss_bits.mean()) - 1.01 * float(optimal_bits(batch).mean()))


def trained_sizes(task: Task, generator: np.random.Generator, sequences: int) -> Batch:
    """About that many fresh test sequences, of the task's test sizes that are no longer than those of the training."""
    sizes = [s for s in task.sizes() if task.test_batch(generator, 1, s).mask.shape[1] <= task.max_time]
    batches = [task.test_batch(generator, -(-sequences // len(sizes)), size) for size in sizes]
    return Batch(
        *(np.concatenate([_padded(array, task.max_time) for array in arrays]) for arrays in zip(*batches, strict=True))
    )


def _padded(array: FloatArray, steps: int) -> FloatArray:
    """``[batch, time, ...]`` with zeros at the end of the time."""
    room = [(0, 0), (0, steps - array.shape[1])] + [(0, 0)] * (array.ndim - 2)
    return np.pad(array, room)


class Evaluator:
    """Runs a model without noise.

    Args:
        model: from sequences to probabilities.
        compiled: whether it is compiled, once for each size; else one graph serves all of them.
    """

    def __init__(self, model: keras.Sequential, *, compiled: bool = True) -> None:
        self.model = model
        self._predict = forward(logits_model(model), compiled=compiled)

    def answer(self, batch: Batch) -> Answers:
        """The model's answers to a batch, counted."""
        parts = [self._count(Batch(*(a[i : i + _SLICE] for a in batch))) for i in range(0, len(batch.mask), _SLICE)]
        return Answers(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))

    def table(self, task: Task, *, sequences: int, seed: int) -> list[Row]:
        """The table of `Task.sizes`, each over as many fresh sequences."""
        return [self.row(task, size, sequences=sequences, seed=seed) for size in task.sizes()]

    def row(self, task: Task, size: tuple[int, ...], *, sequences: int, seed: int) -> Row:
        """One line of the table."""
        generator = np.random.default_rng([seed, *size])
        batch = task.test_batch(generator, sequences, size)
        found = self.answer(batch)
        optimal_bits = getattr(task, "optimal_bits", None)
        return Row(
            size,
            sequences,
            float(found.asked_bits.mean()),
            float(found.wrong_bits.mean()),
            float(np.median(found.wrong_bits)),
            float(found.loss_bits.mean()),
            float((found.wrong_bits == 0).mean()),
            None if optimal_bits is None else float(optimal_bits(batch).mean()),
        )

    def _count(self, batch: Batch) -> Answers:
        """`answer` for few sequences; a smaller last slice is filled up, so that one shape is compiled."""
        rows = len(batch.mask)
        inputs = np.zeros((_SLICE, *batch.inputs.shape[1:]), np.float32)
        inputs[:rows] = batch.inputs
        logits: Any = np.asarray(keras.ops.convert_to_numpy(self._predict(inputs)), np.float64)[:rows]
        asked = np.broadcast_to(batch.mask[..., None], batch.targets.shape)
        loss = np.logaddexp(0.0, np.where(batch.targets > 0.5, -logits, logits)) / np.log(2.0)
        wrong = (logits > 0) != (batch.targets > 0.5)
        return Answers(*((values * asked).sum((1, 2)) for values in (wrong, loss, np.ones_like(loss))))
