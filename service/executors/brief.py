"""Runs that are over sooner than another thread would have begun them."""

import time
from collections.abc import Callable, Hashable

# Seconds of CPU. To hand a run to a thread and its result back takes two wake-ups, some tenths of a millisecond; and
# what takes this long in a thread that has just been woken up takes half of it without.
_BRIEF_S = 600e-6
# So many runs have to have been brief before the next one is taken for granted.
_SEEN = 8
# What a run took is forgotten by so much at the next one: after a long one it takes some dozens of brief ones.
_DECAY = 0.9
# Seconds over which it is seen how much a thread has to do.
_WINDOW_S = 0.02
# Of so many rows or more a batch is worth its price as it is. Smaller ones grow while another one runs in a thread.
_MANY_ROWS = 16
# Shares of the time that a thread may have worked: all of it for a small batch, all but such runs for a large one.
_MOST_WORK = 0.9
_MOST_OWN_WORK = 0.75
# All of it, and with it the runs that it left to others, where more rows are about to come: those that come while one
# is run elsewhere share the next batch, and past this share of its time that is worth more than two wake-ups.
_MOST_WITH_COMPANY = 0.7
# Likewise while longer runs are under way: what is woken up for them as well finds the cores taken.
_MOST_BESIDE = 0.5


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

    def seconds(self, kind: Hashable) -> float:
        """What the next run of this kind may take; 0 where nothing is known."""
        return self._took.get(kind, (0.0, 0))[0]

    def expected(self, kind: Hashable) -> bool:
        """Whether the next one may be run where it is, without another thread."""
        took, seen = self._took.get(kind, (0.0, 0))
        return seen >= _SEEN and took <= _BRIEF_S


class Load:
    """How much a thread has to do, with the runs that it might leave to others and without. Asked by that thread alone.

    Args:
        cpu: Seconds that the thread has worked.
        clock: Seconds.
    """

    def __init__(
        self, cpu: Callable[[], float] = time.thread_time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._cpu = cpu
        self._clock = clock
        self._since = -_WINDOW_S
        self._worked = 0.0
        self._runs = self._left = 0.0
        # Shares of the last window; too much until something is known.
        self._all = self._own = self._would = 1.0

    def ran(self, seconds: float) -> None:
        """The thread has made a run that it might have left to others."""
        self._runs += seconds

    def left(self, seconds: float) -> None:
        """The thread has left a run to others that it might have made."""
        self._left += seconds

    def leaves_time(self, rows: int, *, beside: bool = False, company: bool = False) -> bool:
        """Whether it should make a run itself, as far as other work goes.

        Args:
            rows: Of the run.
            beside: Longer runs are under way.
            company: Other rows are about to come that could share the next batch.
        """
        now = self._clock()
        past = now - self._since
        if past >= _WINDOW_S:
            worked = self._cpu()
            self._all = (worked - self._worked) / past
            self._own = (worked - self._worked - self._runs) / past
            self._would = self._all + self._left / past
            self._since, self._worked, self._runs, self._left = now, worked, 0.0, 0.0
        if beside:
            return self._all <= _MOST_BESIDE
        if rows >= _MANY_ROWS:
            return self._own <= _MOST_OWN_WORK
        return self._would <= _MOST_WITH_COMPANY if company else self._all <= _MOST_WORK
