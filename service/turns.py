"""Turns: one step of a session runs at a time; those that arrive meanwhile wait, first come first served."""

import asyncio
from collections import deque
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from types import TracebackType

from service.types import SessionKey


class Turns:
    """A first-in-first-out lock for every session, which costs nothing for sessions that nobody steps.

    Whose turns are held is a set by itself, apart from who waits: those of many sessions are taken and let go of in one
    call each, as long as nobody waits for any.

    Attributes:
        held: The sessions whose turns somebody holds. The same set all the time; for looking only.
    """

    def __init__(self) -> None:
        self._held: set[SessionKey] = set()
        self._waiting: dict[SessionKey, deque[asyncio.Future[None]]] = {}  # for a turn that is held; none is empty
        self.held: AbstractSet[SessionKey] = self._held

    def of(self, key: SessionKey) -> "_Turn":
        """``async with turns.of(key):`` runs its body alone for this key."""
        return _Turn(self, key)

    def take(self, keys: Sequence[SessionKey]) -> None:
        """Takes turns that are free, until ``release``."""
        self._held.update(keys)

    def take_one(self, key: SessionKey) -> None:
        """Takes one that is free."""
        self._held.add(key)

    def release_one(self, key: SessionKey) -> None:
        """Hands it to the first of those who wait for it."""
        if self._waiting:
            self._hand_over(key)
        else:
            self._held.remove(key)

    def release(self, keys: Sequence[SessionKey]) -> None:
        """Hands each turn to the first of those who wait for it.

        Raises:
            KeyError: one is not held, or comes twice: two have had the same turn.
        """
        if not self._waiting:
            left = len(self._held) - len(keys)
            self._held.difference_update(keys)
            if len(self._held) != left:
                raise KeyError("a turn was let go of that nobody held")
            return
        for key in keys:
            self._hand_over(key)

    def wait(self, key: SessionKey) -> asyncio.Future[None]:
        """Queues up for a turn that is held; done once it is the caller's."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(key, deque()).append(mine)
        return mine

    def _hand_over(self, key: SessionKey) -> None:
        queue = self._waiting.get(key)
        while queue:
            following = queue.popleft()
            if not queue:
                del self._waiting[key]
            if not following.done():
                following.set_result(None)
                return
        self._held.remove(key)


class _Turn:
    """One wait for, and hold of, a key's turn."""

    __slots__ = ("_key", "_turns")

    def __init__(self, turns: Turns, key: SessionKey) -> None:
        self._turns = turns
        self._key = key

    async def __aenter__(self) -> None:
        turns = self._turns
        if self._key not in turns.held:
            turns.take_one(self._key)
            return
        mine = turns.wait(self._key)
        try:
            await mine
        except asyncio.CancelledError:
            # Cancelled after the turn was handed over, before this task could run: hand it on.
            if mine.done() and not mine.cancelled():
                turns.release_one(self._key)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._turns.release_one(self._key)
