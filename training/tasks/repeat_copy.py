"""Repeat copy (Graves et al. 2014, section 4.2): give a sequence back a number of times, and mark the end."""

import math
from dataclasses import dataclass

import numpy as np

from training.checks import expect_integers, expect_order
from training.tasks.base import Batch, FloatArray, Generator, stack


@dataclass(frozen=True)
class RepeatCopyTask:
    """Start flag, random vectors, end flag with the number of repeats, and then the copies and an end marker.

    A step has ``bits + 3`` inputs: the vector, the start flag, the end flag and the number of repeats, which stands
    beside the end flag and is scaled to a mean of zero and a variance of one over the training range. An output has
    ``bits + 1`` values: the vector, and the end marker, which is asked to be up in the step after the last copy and
    down before it, so that the network has to count.

    Attributes:
        bits: width of a vector.
        min_length: shortest training sequence.
        max_length: longest training sequence.
        min_repeats: fewest copies in training.
        max_repeats: most copies in training.
    """

    bits: int = 8
    min_length: int = 1
    max_length: int = 10
    min_repeats: int = 1
    max_repeats: int = 10

    def __post_init__(self) -> None:
        expect_integers(self, ("bits", "min_length", "max_length", "min_repeats", "max_repeats"))
        expect_order(self, "min_length", "max_length")
        expect_order(self, "min_repeats", "max_repeats")

    @property
    def input_dim(self) -> int:
        """The vector, two flags and the number of repeats."""
        return self.bits + 3

    @property
    def output_dim(self) -> int:
        """The vector and the end marker."""
        return self.bits + 1

    @property
    def max_time(self) -> int:
        """Two flags, the vectors, their copies, and the end marker."""
        return self.max_length * (self.max_repeats + 1) + 3

    def training_batch(self, generator: Generator, batch_size: int, difficulty: float = 1.0) -> Batch:
        """Lengths and repeats drawn evenly from their ranges, whose upper ends ``difficulty`` scales."""
        longest = max(self.min_length, round(self.max_length * difficulty))
        most = max(self.min_repeats, round(self.max_repeats * difficulty))
        lengths = generator.integers(self.min_length, longest + 1, batch_size)
        repeats = generator.integers(self.min_repeats, most + 1, batch_size)
        rows = [self._sequence(generator, n, r) for n, r in zip(lengths, repeats, strict=True)]
        return stack(rows, self.max_time)

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Lengths and repeats: the trained range, then twice the length, then twice the repeats."""
        return ((3, 3), (5, 5), (10, 1), (1, 10), (10, 10), (20, 10), (10, 20))

    def test_batch(self, generator: Generator, batch_size: int, size: tuple[int, ...]) -> Batch:
        """All of one length and one number of repeats."""
        return stack([self._sequence(generator, *size) for _ in range(batch_size)])

    def validation_batch(self, generator: Generator, batch_size: int) -> Batch:
        """The training ranges; every fourth sequence is up to twice as long as any in training."""
        lengths = generator.integers(self.min_length, self.max_length + 1, batch_size)
        lengths[3::4] += self.max_length
        repeats = generator.integers(self.min_repeats, self.max_repeats + 1, batch_size)
        rows = [self._sequence(generator, n, r) for n, r in zip(lengths, repeats, strict=True)]
        return stack(rows, 2 * self.max_length * (self.max_repeats + 1) + 3)

    def _scaled(self, repeats: int) -> float:
        """The number of repeats, with the mean and the deviation of the even training distribution taken out."""
        mean = (self.min_repeats + self.max_repeats) / 2
        count = self.max_repeats - self.min_repeats + 1
        deviation = math.sqrt((count**2 - 1) / 12)
        return (repeats - mean) / (deviation or 1.0)

    def _sequence(self, generator: Generator, length: int, repeats: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Inputs, targets and mask of one sequence."""
        vectors = (generator.random((length, self.bits)) < 0.5).astype(np.float32)
        asked = length * repeats + 1
        inputs = np.zeros((length + 2 + asked, self.input_dim), np.float32)
        inputs[0, self.bits] = 1.0
        inputs[1 : length + 1, : self.bits] = vectors
        inputs[length + 1, self.bits + 1] = 1.0
        inputs[length + 1, self.bits + 2] = self._scaled(repeats)
        targets = np.zeros((length + 2 + asked, self.output_dim), np.float32)
        targets[length + 2 : -1, : self.bits] = np.tile(vectors, (repeats, 1))
        targets[-1, self.bits] = 1.0
        mask = np.zeros(length + 2 + asked, np.float32)
        mask[length + 2 :] = 1.0
        return inputs, targets, mask
