"""Deadlines of many steps at once: a timer for each tick in which some of them end, not one for each step."""

import asyncio
import math
from collections.abc import Callable
from typing import Protocol

# Seconds. A step is told at most this much late that its time is over.
_TICK_S = 0.01


class Expiring(Protocol):
    """What has a deadline."""

    def expire(self) -> None:
        """Its deadline has passed."""
        ...


class Deadlines:
    """Calls ``expire`` on what was added and not discarded by its deadline. One event loop's own.

    Args:
        call_at: ``loop.call_at``; None for that of the running loop.
    """

    def __init__(self, call_at: Callable[..., asyncio.TimerHandle] | None = None) -> None:
        self._call_at = call_at
        self._ticks: dict[int, set[Expiring]] = {}

    def add(self, step: Expiring, deadline: float) -> int:
        """Expects ``step`` to be through by ``deadline``, on the event loop's clock; returns what ``discard`` takes."""
        tick = math.ceil(deadline / _TICK_S)
        there = self._ticks.get(tick)
        if there is None:
            self._ticks[tick] = {step}
            (self._call_at or asyncio.get_running_loop().call_at)(tick * _TICK_S, self._ring, tick)
        else:
            there.add(step)
        return tick

    def discard(self, step: Expiring, tick: int) -> None:
        """``step`` is through. Safe to call twice."""
        there = self._ticks.get(tick)
        if there is not None:
            there.discard(step)

    def _ring(self, tick: int) -> None:
        for step in tuple(self._ticks.pop(tick)):
            step.expire()
