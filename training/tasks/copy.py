"""Copy (Graves et al. 2014, section 4.1): after the delimiter, give back the vectors seen before it."""

from dataclasses import dataclass

import numpy as np

from training.checks import expect_integers, expect_order, expect_shares
from training.tasks.base import Batch, FloatArray, Generator, stack


@dataclass(frozen=True)
class CopyTask:
    """Start flag, random vectors, end flag, and then as many steps of recall as there were vectors.

    A step has ``bits + 2`` inputs: the vector, the start flag and the end flag. Each flag is up for one step alone.

    Attributes:
        bits: width of a vector.
        min_length: shortest training sequence.
        max_length: longest training sequence.
        blank: the share of *training* vectors replaced by zeros. Such a vector looks like a step of recall, and only
            one random vector in 256 is blank, so that without this a network learns late to tell the two apart.
        skewed: the share of training vectors with an own density of ones, drawn evenly from 0..1. Vectors of nearly all
            ones are as rare, and a network that has hardly met them takes one in a thousand for something else.
    """

    bits: int = 8
    min_length: int = 1
    max_length: int = 20
    blank: float = 0.1
    skewed: float = 0.2

    def __post_init__(self) -> None:
        expect_integers(self, ("bits", "min_length", "max_length"))
        expect_order(self, "min_length", "max_length")
        expect_shares(self, ("blank", "skewed"))

    @property
    def input_dim(self) -> int:
        """The vector and two flags."""
        return self.bits + 2

    @property
    def output_dim(self) -> int:
        """The vector."""
        return self.bits

    @property
    def max_time(self) -> int:
        """Two flags, and the vectors twice."""
        return 2 * self.max_length + 2

    def training_batch(self, generator: Generator, batch_size: int, difficulty: float = 1.0) -> Batch:
        """Lengths drawn evenly from ``min_length`` to ``max_length`` (scaled by ``difficulty``)."""
        longest = max(self.min_length, round(self.max_length * difficulty))
        lengths = generator.integers(self.min_length, longest + 1, batch_size)
        return stack([self._sequence(self._hard_vectors(generator, n)) for n in lengths], self.max_time)

    def hard_batch(self, generator: Generator, batch_size: int) -> Batch:
        """What networks were seen to fail in when they had learned: sequences whose vectors are like one another.

        At the end flag a network finds the slot of the first vector by what is in it. It fails where other slots hold
        nearly the same, or where its focus stands too firmly on another slot to be moved: mostly in short sequences
        with many blank vectors, with one density of ones, or with a few vectors again and again.
        """
        lengths = generator.integers(self.min_length, self.max_length + 1, batch_size)
        draws = (self._hard_vectors, self._blank_vectors, self._dense_vectors, self._repeated_vectors)
        kinds = generator.integers(len(draws), size=batch_size)
        rows = [self._sequence(draws[kind](generator, n)) for kind, n in zip(kinds, lengths, strict=True)]
        return stack(rows, self.max_time)

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Lengths, to six times the trained one."""
        return tuple((length,) for length in (5, 10, 20, 40, 60, 80, 120))

    def test_batch(self, generator: Generator, batch_size: int, size: tuple[int, ...]) -> Batch:
        """Evenly random bits, nothing blanked."""
        return stack([self._sequence(self._vectors(generator, size[0])) for _ in range(batch_size)])

    def validation_batch(self, generator: Generator, batch_size: int) -> Batch:
        """Lengths to six times the trained one; every other sequence is drawn as in training, which is harder."""
        lengths = np.linspace(self.min_length, 6 * self.max_length, batch_size).round().astype(int)
        draws = (self._vectors, self._hard_vectors)
        rows = [self._sequence(draws[row % 2](generator, n)) for row, n in enumerate(lengths)]
        return stack(rows, 12 * self.max_length + 2)

    def _vectors(self, generator: Generator, length: int, density: FloatArray | float = 0.5) -> FloatArray:
        """``[length, bits]``, of which about ``density`` are ones: one for all, or ``[length, 1]``."""
        return (generator.random((length, self.bits)) < density).astype(np.float32)

    def _hard_vectors(self, generator: Generator, length: int) -> FloatArray:
        """``[length, bits]``, some of them blank and some skewed."""
        kind = generator.random((length, 1))
        skewed = np.where(kind < self.blank + self.skewed, generator.random((length, 1)), 0.5)
        return self._vectors(generator, length, np.where(kind < self.blank, 0.0, skewed))

    def _blank_vectors(self, generator: Generator, length: int) -> FloatArray:
        """``[length, bits]``, some or most of them blank."""
        blank = generator.random((length, 1)) < generator.random()
        return self._vectors(generator, length, np.where(blank, 0.0, 0.5))

    def _dense_vectors(self, generator: Generator, length: int) -> FloatArray:
        """``[length, bits]``, all of one density of ones, from nearly none to nearly all."""
        return self._vectors(generator, length, generator.random())

    def _repeated_vectors(self, generator: Generator, length: int) -> FloatArray:
        """``[length, bits]``, of at most three different vectors."""
        few = self._hard_vectors(generator, int(generator.integers(1, 4)))
        return few[generator.integers(len(few), size=length)]

    def _sequence(self, vectors: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Inputs, targets and mask of one sequence."""
        length = len(vectors)
        inputs = np.zeros((2 * length + 2, self.input_dim), np.float32)
        inputs[0, self.bits] = 1.0
        inputs[1 : length + 1, : self.bits] = vectors
        inputs[length + 1, self.bits + 1] = 1.0
        targets = np.zeros((2 * length + 2, self.bits), np.float32)
        targets[length + 2 :] = vectors
        mask = np.zeros(2 * length + 2, np.float32)
        mask[length + 2 :] = 1.0
        return inputs, targets, mask
