"""Threads that run batches for an event loop, with as little between the two as there can be.

``loop.run_in_executor`` makes two futures for each call, one with locks of its own, and has each tell the other. What
is needed here is a queue there and a call back.
"""

import asyncio
import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeAlias, TypeVar

from service.executors.threads import begin_thread

_T = TypeVar("_T")
_Work: TypeAlias = Callable[[], _T]


class Runners(Generic[_T]):
    """A few threads of one event loop. All methods are for that loop's thread.

    Threads are made when they are first needed. They do not keep the process from ending: a call that hangs cannot be
    interrupted.

    Args:
        threads: How many there are at the most.
        name: Of each, as the operating system shows it.
        niceness: As of ``nice``.
    """

    def __init__(self, threads: int, name: str, niceness: int) -> None:
        self._most = threads
        self._name = name
        self._niceness = niceness
        self._loop = asyncio.get_running_loop()
        self._queue: SimpleQueue[tuple[asyncio.Future[_T], _Work[_T]] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._under_way = 0  # in threads, or waiting for one
        self._closed = False

    def run(self, work: _Work[_T]) -> asyncio.Future[_T]:
        """Has a thread call ``work``. A call that is cancelled before it has begun never begins.

        Raises:
            RuntimeError: closed, or there can be no more threads.
        """
        if self._closed:
            raise RuntimeError("the runners are closed")
        if len(self._threads) < min(self._most, self._under_way + 1):
            thread = threading.Thread(target=self._work, name=self._name, daemon=True)
            thread.start()
            self._threads.append(thread)
        self._under_way += 1
        future: asyncio.Future[_T] = self._loop.create_future()
        self._queue.put((future, work))
        return future

    def close(self) -> None:
        """Takes nothing more. What waits is still run, and then the threads end."""
        if not self._closed:
            self._closed = True
            for _ in self._threads:
                self._queue.put(None)

    def join(self, limit: float) -> None:
        """Waits for the threads to end, so many seconds each at the most. For another thread, after ``close``."""
        for thread in self._threads:
            thread.join(limit)

    def _work(self) -> None:
        begin_thread(self._name, self._niceness)
        while (item := self._queue.get()) is not None:
            future, work = item
            result, error = None, None
            if not future.cancelled():
                try:
                    result = work()
                except BaseException as raised:  # noqa: BLE001 - whoever waits for it is told, whatever it is
                    error = raised
            try:
                self._loop.call_soon_threadsafe(self._ended, future, result, error)
            except RuntimeError:  # the loop is closed: nobody waits any more
                return
            del item, future, work, result, error  # while it waits for the next one, it holds on to nothing

    def _ended(self, future: asyncio.Future[_T], result: Any, error: BaseException | None) -> None:
        self._under_way -= 1
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)
