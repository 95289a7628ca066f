"""Dynamic n-grams (Graves et al. 2014, section 4.4): predict bits whose statistics are new in every sequence."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from training.checks import expect, expect_integers
from training.tasks.base import Batch, Generator


@dataclass(frozen=True)
class NGramsTask:
    """Bits of a source with a memory of ``context`` bits; at each step the next bit is to be predicted.

    For each sequence the probability of a 1 after each of the ``2 ** context`` contexts is drawn from
    Beta(1/2, 1/2). The first context is random and is only shown; the ``length`` bits after it are asked for. No
    network can know them: the least loss that can be reached is that of `optimal_bits`.

    Attributes:
        length: bits to predict in a sequence.
        context: bits that the next one depends on; the paper's 6-grams have 5.
    """

    length: int = 200
    context: int = 5

    def __post_init__(self) -> None:
        expect_integers(self, ("length", "context"))
        # A table for each sequence has 2 ** context entries.
        expect(self.context <= 16, "context", "at most 16", self.context)

    @property
    def input_dim(self) -> int:
        """The present bit."""
        return 1

    @property
    def output_dim(self) -> int:
        """The next bit."""
        return 1

    @property
    def max_time(self) -> int:
        """The context and all bits but the last, which only is a target."""
        return self.context + self.length - 1

    def training_batch(self, generator: Generator, batch_size: int, difficulty: float = 1.0) -> Batch:
        """Sequences of the full length, of which only as much is asked for as ``difficulty`` says."""
        asked = max(1, round(self.length * difficulty))
        batch = self.test_batch(generator, batch_size, (self.length,))
        batch.mask[:, self.context - 1 + asked :] = 0.0
        return batch

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Bits to predict: parts of the trained length, all of it, and twice as many."""
        return tuple((round(self.length * part),) for part in (0.25, 0.5, 1.0, 2.0))

    def test_batch(self, generator: Generator, batch_size: int, size: tuple[int, ...]) -> Batch:
        """Sequences with that many bits to predict."""
        bits = self._bits(generator, batch_size, size[0])
        mask = np.ones((batch_size, bits.shape[1] - 1), np.float32)
        mask[:, : self.context - 1] = 0.0
        values = bits[..., None].astype(np.float32)
        return Batch(values[:, :-1], values[:, 1:], mask)

    def validation_batch(self, generator: Generator, batch_size: int) -> Batch:
        """The training distribution."""
        return self.training_batch(generator, batch_size)

    def optimal_bits(self, batch: Batch) -> npt.NDArray[np.float64]:
        """The loss of the Bayes-optimal predictor, in bits, for each sequence: equation (10) of the paper.

        After a context that was followed by N1 ones and N0 zeros so far, it predicts a 1 with the probability
        (N1 + 1/2) / (N1 + N0 + 1).

        Args:
            batch: as the other methods make it.

        Returns:
            ``[batch]``; what the mask leaves out is learned from, but not counted.
        """
        shown, following = (values[..., 0].astype(int) for values in (batch.inputs, batch.targets))
        rows = np.arange(len(shown))
        counts = np.full((len(shown), 2**self.context, 2), 0.5)
        loss = np.zeros(len(shown))
        for step in range(self.context - 1, shown.shape[1]):
            context = self._number(shown[:, step - self.context + 1 : step + 1])
            seen, bit = counts[rows, context], following[:, step]
            loss -= np.log2(seen[rows, bit] / seen.sum(1)) * batch.mask[:, step]
            counts[rows, context, bit] += 1.0
        return loss

    def _bits(self, generator: Generator, batch_size: int, length: int) -> npt.NDArray[np.int64]:
        """``[batch, context + length]``: a random context and what the source gives after it."""
        table = generator.beta(0.5, 0.5, (batch_size, 2**self.context))
        bits = np.zeros((batch_size, self.context + length), np.int64)
        bits[:, : self.context] = generator.integers(2, size=(batch_size, self.context))
        chance = generator.random((batch_size, length))
        for step in range(length):
            context = self._number(bits[:, step : step + self.context])
            bits[:, self.context + step] = chance[:, step] < table[np.arange(batch_size), context]
        return bits

    def _number(self, bits: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The contexts ``[batch, context]`` as the numbers of their rows in a table."""
        number: npt.NDArray[np.int64] = bits @ (2 ** np.arange(self.context))
        return number
