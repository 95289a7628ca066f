"""An event loop that looks for the next step for a moment before it sleeps.

A core with nothing to do is put to sleep, and what it had in its caches may be gone when it wakes up: the same Python
takes twice as long then. Where one caller sends a step as soon as the last one is answered, it is woken up a few tenths
of a millisecond later, each time.
"""

import asyncio
import time
from collections.abc import Callable


class IdlePoll:
    """Keeps the event loop's thread awake while the next thing to do is about to come.

    That is expected where the last one came in time; so whoever takes longer costs one wait, and then nothing.

    Args:
        seconds: The longest that it looks; 0 for never.
        clock: Seconds.
        cpu: Seconds that the thread has run.
        loop: Returns the event loop.
    """

    def __init__(
        self,
        seconds: float,
        *,
        clock: Callable[[], float] = time.perf_counter,
        cpu: Callable[[], float] = time.thread_time,
        loop: Callable[[], asyncio.AbstractEventLoop] = asyncio.get_running_loop,
    ) -> None:
        self._seconds = seconds
        self._clock = clock
        self._cpu = cpu
        self._loop = loop
        self._idle_since: float | None = None
        self._expected = False
        self._next_look: asyncio.Handle | None = None
        self._cpu_before = 0.0
        self._polled = 0.0

    def worked(self) -> float:
        """Seconds that the thread has run, without those of looking."""
        return self._cpu() - self._polled

    def begin(self) -> None:
        """There is nothing more to do for now."""
        self._idle_since = self._clock()
        if self._expected and self._next_look is None:
            self._next_look = self._loop().call_soon(self._first_look)

    def end(self) -> None:
        """There is."""
        if self._idle_since is None:
            return
        self._expected = self._clock() - self._idle_since < self._seconds
        self._idle_since = None
        self._stop()

    def _first_look(self) -> None:
        # What the loop does until then is work: the last step is answered.
        self._cpu_before = self._cpu()
        self._look()

    def _look(self) -> None:
        """Has the loop ask the system once more before it sleeps: with something to call at once, it does not wait."""
        now = self._cpu()
        self._polled += now - self._cpu_before
        self._cpu_before = now
        if self._idle_since is not None and self._clock() - self._idle_since < self._seconds:
            self._next_look = self._loop().call_soon(self._look)
        else:
            self._stop()

    def _stop(self) -> None:
        if self._next_look is not None:
            self._next_look.cancel()
            self._next_look = None
