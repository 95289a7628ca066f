"""A queue in which nobody waits for the whole of somebody else's flood."""

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Generic, Protocol, Self, TypeVar


class Queued(Protocol):
    """What can be queued: some rows that somebody asked for. How many must not change while it is queued."""

    caller: str
    size: int

    def split(self, count: int, /) -> Self:
        """Its first ``count`` rows; the others stay."""
        ...


_T = TypeVar("_T", bound=Queued)


class FairQueue(Generic[_T]):
    """First in, first out for each caller; callers take turns. Its length is the rows in it.

    Every operation but ``keep`` takes the same time at any length.

    Attributes:
        rows: Its length, for those who ask a dozen times for each batch.
    """

    def __init__(self) -> None:
        self._queues: dict[str, deque[_T]] = {}  # in the order of their turns; none is empty
        self.rows = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[_T]:
        for queue in self._queues.values():
            yield from queue

    @property
    def callers(self) -> int:
        """How many take turns."""
        return len(self._queues)

    def append(self, item: _T) -> None:
        """Puts an item behind those of its caller; a caller who had none comes last."""
        queue = self._queues.get(item.caller)
        if queue is None:
            queue = self._queues[item.caller] = deque()
        queue.append(item)
        self.rows += item.size

    def take(self, most: int) -> _T:
        """Takes the first item of the caller whose turn it is, or of a larger one the first ``most`` rows.

        Raises:
            IndexError: it is empty.
        """
        if not self._queues:
            raise IndexError("take from an empty queue")
        return self._take(next(iter(self._queues)), most)

    def take_small(self, most: int, callers: int) -> Iterator[_T]:
        """Takes the first item of each caller in turn, where it has at most ``most`` rows; the others keep their turns.

        Args:
            most: Rows.
            callers: Of how many, from the one on whose turn it is.
        """
        for caller in tuple(itertools.islice(self._queues, callers)):
            if self._queues[caller][0].size <= most:
                yield self._take(caller, most)

    def _take(self, caller: str, most: int) -> _T:
        queue = self._queues[caller]
        item = queue[0].split(most) if queue[0].size > most else queue.popleft()
        self.rows -= item.size
        if not queue:
            del self._queues[caller]
        elif len(self._queues) > 1:
            del self._queues[caller]
            self._queues[caller] = queue  # its next turn comes last
        return item

    def keep(self, wanted: Callable[[_T], bool]) -> None:
        """Drops the items that are not wanted; ``wanted`` may drop rows of one."""
        kept = {caller: deque(filter(wanted, queue)) for caller, queue in self._queues.items()}
        self._queues = {caller: queue for caller, queue in kept.items() if queue}
        self.rows = sum(item.size for item in self)
