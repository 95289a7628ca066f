"""What every task is: a source of batches that depend on a seed and nothing else."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
Generator = np.random.Generator


class Batch(NamedTuple):
    """Sequences side by side, padded with zeros to the longest.

    Attributes:
        inputs: ``[batch, time, input_dim]``.
        targets: ``[batch, time, output_dim]``, bits.
        mask: ``[batch, time]``: 1.0 where the output counts, else 0.0.
    """

    inputs: FloatArray
    targets: FloatArray
    mask: FloatArray


def trimmed(batches: Sequence[Batch], multiple: int = 8) -> list[Batch]:
    """The batches without the steps behind the last one that any of them asks for.

    Args:
        batches: all of one shape.
        multiple: the number of steps left is one of this, so that few shapes are compiled as the sequences grow.
    """
    asked = np.flatnonzero(np.max([batch.mask.max(0) for batch in batches], axis=0))
    steps = multiple * -(-(int(asked[-1]) + 1) // multiple)
    return [Batch(*(array[:, :steps] for array in batch)) for batch in batches]


class Task(Protocol):
    """A task of the paper, with its sizes as fields.

    Two methods more, where a task has use for them: ``optimal_bits(batch)``, the loss that no network can be below, and
    ``hard_batch(generator, batch_size)``, what a network that has learned the task still fails in. Networks settle on
    the latter.
    """

    @property
    def input_dim(self) -> int:
        """Values in one input step."""
        ...

    @property
    def output_dim(self) -> int:
        """Bits in one output step."""
        ...

    @property
    def max_time(self) -> int:
        """Steps of the longest training sequence; training batches are padded to it, so that one shape is compiled."""
        ...

    def training_batch(self, generator: Generator, batch_size: int, difficulty: float = 1.0) -> Batch:
        """Random sequences of the training distribution; ``difficulty`` in 0..1 scales the sizes drawn."""
        ...

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """The sizes that a trained model is measured at, those past the training range included."""
        ...

    def test_batch(self, generator: Generator, batch_size: int, size: tuple[int, ...]) -> Batch:
        """Random sequences, all of one size."""
        ...

    def validation_batch(self, generator: Generator, batch_size: int) -> Batch:
        """Sequences that a solved model must answer without a fault: inside the training range and past it."""
        ...


def stack(sequences: list[tuple[FloatArray, FloatArray, FloatArray]], time: int | None = None) -> Batch:
    """Pads single sequences (inputs, targets, mask) at the end and puts them side by side.

    Args:
        sequences: each ``[time, input_dim]``, ``[time, output_dim]``, ``[time]``.
        time: steps to pad to; the longest sequence's if None.
    """
    steps = time or max(len(mask) for _, _, mask in sequences)

    def pad(arrays: tuple[FloatArray, ...]) -> FloatArray:
        padded = np.zeros((len(arrays), steps, *arrays[0].shape[1:]), np.float32)
        for row, array in zip(padded, arrays, strict=True):
            row[: len(array)] = array
        return padded

    inputs, targets, masks = zip(*sequences, strict=True)
    return Batch(pad(inputs), pad(targets), pad(masks))
