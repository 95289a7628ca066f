"""Runs that are over sooner than another thread would have begun them."""

from collections.abc import Hashable

# Seconds of CPU. To hand a run to a thread and its result back takes two wake-ups, about as long; and what takes that
# in a thread that has just been woken up takes a third of it without.
_BRIEF_S = 300e-6
# So many runs have to have been brief before the next one is taken for granted.
_SEEN = 8
# What a run took is forgotten by so much at the next one: after a long one it takes some dozens of brief ones.
_DECAY = 0.9


class BriefRuns:
    """Learns from the runs of each kind whether they are brief.

    Only for what can wait for nothing but the processor.
    """

    def __init__(self) -> None:
        self._took: dict[Hashable, tuple[float, int]] = {}

    def note(self, kind: Hashable, seconds: float) -> None:
        """A run of this kind took so many seconds of CPU. Any thread may say so."""
        took, seen = self._took.get(kind, (0.0, 0))
        self._took[kind] = max(seconds, _DECAY * took), seen + 1

    def expected(self, kind: Hashable) -> bool:
        """Whether the next one may be run where it is, without another thread."""
        took, seen = self._took.get(kind, (0.0, 0))
        return seen >= _SEEN and took <= _BRIEF_S
