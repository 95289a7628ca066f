"""Priority sort (Graves et al. 2014, section 4.5): give back the vectors of highest priority, highest first."""

from dataclasses import dataclass

import numpy as np

from training.checks import expect, expect_integers
from training.tasks.base import Batch, FloatArray, Generator, stack


@dataclass(frozen=True)
class PrioritySortTask:
    """Start flag, random vectors each beside its priority, end flag, and then the sorted vectors.

    A step has ``bits + 3`` inputs: the vector, its priority (drawn evenly from -1..1), the start flag and the end flag.

    Attributes:
        bits: width of a vector.
        shown: vectors in a sequence.
        returned: how many of them are asked for.
    """

    bits: int = 8
    shown: int = 20
    returned: int = 16

    def __post_init__(self) -> None:
        expect_integers(self, ("bits", "shown", "returned"))
        expect(self.returned <= self.shown, "returned", f"at most shown, {self.shown}", self.returned)

    @property
    def input_dim(self) -> int:
        """The vector, its priority and two flags."""
        return self.bits + 3

    @property
    def output_dim(self) -> int:
        """The vector."""
        return self.bits

    @property
    def max_time(self) -> int:
        """Two flags, the vectors shown and those returned."""
        return self.shown + self.returned + 2

    def training_batch(self, generator: Generator, batch_size: int, difficulty: float = 1.0) -> Batch:
        """All of one size: the full one, or as much smaller as ``difficulty`` says."""
        shown = max(1, round(self.shown * difficulty))
        returned = max(1, round(self.returned * difficulty))
        return stack([self._sequence(generator, shown, returned) for _ in range(batch_size)], self.max_time)

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Vectors shown and returned: the trained size alone, because the paper asks for no other."""
        return ((self.shown, self.returned),)

    def test_batch(self, generator: Generator, batch_size: int, size: tuple[int, ...]) -> Batch:
        """All of one size."""
        return stack([self._sequence(generator, *size) for _ in range(batch_size)])

    def validation_batch(self, generator: Generator, batch_size: int) -> Batch:
        """The training distribution."""
        return self.training_batch(generator, batch_size)

    def _sequence(self, generator: Generator, shown: int, returned: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Inputs, targets and mask of one sequence."""
        vectors = (generator.random((shown, self.bits)) < 0.5).astype(np.float32)
        priorities = generator.uniform(-1.0, 1.0, shown)
        order = np.argsort(-priorities, kind="stable")[:returned]
        inputs = np.zeros((shown + returned + 2, self.input_dim), np.float32)
        inputs[0, self.bits + 1] = 1.0
        inputs[1 : shown + 1, : self.bits] = vectors
        inputs[1 : shown + 1, self.bits] = priorities
        inputs[shown + 1, self.bits + 2] = 1.0
        targets = np.zeros((shown + returned + 2, self.bits), np.float32)
        targets[shown + 2 :] = vectors[order]
        mask = np.zeros(shown + returned + 2, np.float32)
        mask[shown + 2 :] = 1.0
        return inputs, targets, mask
