"""Associative recall (Graves et al. 2014, section 4.3): shown one of several items again, give the next one."""

from dataclasses import dataclass

import numpy as np

from training.checks import expect, expect_integers, expect_order
from training.tasks.base import Batch, FloatArray, Generator, stack


@dataclass(frozen=True)
class AssociativeRecallTask:
    """Items, each behind an item flag; then one of them between two query flags; then the item that followed it.

    An item is ``item_length`` vectors. A step has ``bits + 2`` inputs: the vector, the item flag and the query flag.
    The items of an episode differ, so that every query has one answer; the query is any item but the last.

    Attributes:
        bits: width of a vector.
        item_length: vectors in an item.
        min_items: fewest items in a training episode, at least 2.
        max_items: most items in a training episode.
    """

    bits: int = 6
    item_length: int = 3
    min_items: int = 2
    max_items: int = 6

    def __post_init__(self) -> None:
        expect_integers(self, ("bits", "item_length"))
        expect_integers(self, ("min_items", "max_items"), least=2)
        expect_order(self, "min_items", "max_items")
        # Items are drawn until all differ; validation has twice as many as training, the longest test more.
        bits, most = self.bits * self.item_length, self.sizes()[-1][0]
        expect(2**bits >= 2 * most, "bits x item_length", f"enough for {2 * most} different items", bits)

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
        """The longest episode."""
        return self._time(self.max_items)

    def training_batch(self, generator: Generator, batch_size: int, difficulty: float = 1.0) -> Batch:
        """Numbers of items drawn evenly from ``min_items`` to ``max_items`` (scaled by ``difficulty``)."""
        most = max(self.min_items, round(self.max_items * difficulty))
        counts = generator.integers(self.min_items, most + 1, batch_size)
        return stack([self._episode(generator, n) for n in counts], self.max_time)

    def sizes(self) -> tuple[tuple[int, ...], ...]:
        """Numbers of items: each of the trained ones, then to more than three times as many."""
        trained = range(self.min_items, self.max_items + 1)
        return tuple((n,) for n in (*trained, *(round(self.max_items * f) for f in (4 / 3, 5 / 3, 2, 8 / 3, 10 / 3))))

    def test_batch(self, generator: Generator, batch_size: int, size: tuple[int, ...]) -> Batch:
        """All of one number of items."""
        return stack([self._episode(generator, size[0]) for _ in range(batch_size)])

    def validation_batch(self, generator: Generator, batch_size: int) -> Batch:
        """From the fewest items to twice as many as in training."""
        counts = np.linspace(self.min_items, 2 * self.max_items, batch_size).round().astype(int)
        return stack([self._episode(generator, n) for n in counts], self._time(2 * self.max_items))

    def _time(self, items: int) -> int:
        """Steps of an episode: a flag before each item, two around the query, and the answer."""
        return items * (self.item_length + 1) + (self.item_length + 2) + self.item_length

    def _items(self, generator: Generator, count: int) -> FloatArray:
        """``[count, item_length, bits]``, all different."""
        while True:
            items = (generator.random((count, self.item_length, self.bits)) < 0.5).astype(np.float32)
            if len(np.unique(items.reshape(count, -1), axis=0)) == count:
                return items

    def _episode(self, generator: Generator, count: int) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Inputs, targets and mask of one episode."""
        items = self._items(generator, count)
        queried = generator.integers(count - 1)
        length, steps = self.item_length, self._time(count)
        inputs = np.zeros((steps, self.input_dim), np.float32)
        shown = inputs[: count * (length + 1)].reshape(count, length + 1, self.input_dim)
        shown[:, 0, self.bits] = 1.0
        shown[:, 1:, : self.bits] = items
        query = inputs[count * (length + 1) : -length]
        query[[0, -1], self.bits + 1] = 1.0
        query[1:-1, : self.bits] = items[queried]
        targets = np.zeros((steps, self.output_dim), np.float32)
        targets[-length:] = items[queried + 1]
        mask = np.zeros(steps, np.float32)
        mask[-length:] = 1.0
        return inputs, targets, mask
