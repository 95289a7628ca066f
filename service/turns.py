"""Turns: one step of a session runs at a time; those that arrive meanwhile wait, first come first served."""

import asyncio
from collections import deque
from collections.abc import KeysView, Sequence
from types import TracebackType
from typing import TypeAlias

from service.types import SessionKey

_Waiting: TypeAlias = dict[SessionKey, deque[asyncio.Future[None]] | None]


class Turns:
    """A first-in-first-out lock for every session, which costs nothing for sessions that nobody steps."""

    def __init__(self) -> None:
        # A key is here while somebody holds its turn; its deque holds those who wait, once somebody does.
        self._waiting: _Waiting = {}

    def of(self, key: SessionKey) -> "_Turn":
        """``async with turns.of(key):`` runs its body alone for this key."""
        return _Turn(self._waiting, key)

    @property
    def held(self) -> KeysView[SessionKey]:
        """The sessions whose turns somebody holds."""
        return self._waiting.keys()

    def take(self, keys: Sequence[SessionKey]) -> None:
        """Takes turns that are free, until ``release``."""
        self._waiting.update(dict.fromkeys(keys))

    def take_one(self, key: SessionKey) -> None:
        """Takes one that is free."""
        self._waiting[key] = None

    def release_one(self, key: SessionKey) -> None:
        """Hands it to the first of those who wait for it."""
        if self._waiting[key] is None:
            del self._waiting[key]
        else:
            _release(self._waiting, key)

    def release(self, keys: Sequence[SessionKey]) -> None:
        """Hands each turn to the first of those who wait for it."""
        waiting = self._waiting
        for key in keys:
            if waiting[key] is None:
                del waiting[key]
            else:
                _release(waiting, key)


class _Turn:
    """One wait for, and hold of, a key's turn."""

    __slots__ = ("_key", "_waiting")

    def __init__(self, waiting: _Waiting, key: SessionKey) -> None:
        self._waiting = waiting
        self._key = key

    async def __aenter__(self) -> None:
        if self._key not in self._waiting:
            self._waiting[self._key] = None
            return
        queue = self._waiting[self._key]
        if queue is None:
            queue = self._waiting[self._key] = deque()
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(mine)
        try:
            await mine
        except asyncio.CancelledError:
            # Cancelled after the turn was handed over, before this task could run: hand it on.
            if mine.done() and not mine.cancelled():
                _release(self._waiting, self._key)
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _release(self._waiting, self._key)


def _release(waiting: _Waiting, key: SessionKey) -> None:
    queue = waiting[key]
    while queue:
        following = queue.popleft()
        if not following.done():
            following.set_result(None)
            return
    del waiting[key]
