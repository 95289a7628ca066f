"""Compiles shapes in the background, on a thread that yields to everything else."""

import heapq
import logging
import threading
import time

from service.errors import ServiceError
from service.executors.saved_model import SavedModel
from service.executors.threads import begin_thread
from service.types import VersionKey

_log = logging.getLogger(__name__)

_ASKED_FOR, _FORESEEN = 0, 1
# Below the threads that run batches, but not idle: on a machine that is busy stepping plain graphs, compiling is what
# relieves it.
_NICENESS = 10
# How long closing waits for a compile that is under way; it cannot be interrupted.
_PATIENCE_S = 1.0


class Compiler:
    """A queue of shapes, and the thread that compiles them: those that were asked for first, then the foreseen."""

    def __init__(self) -> None:
        self._queue: list[tuple[int, int, SavedModel, tuple[int, int]]] = []
        self._known: dict[tuple[VersionKey, int, int], int] = {}
        self._given_up: set[VersionKey] = set()
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._count = 0
        self._thread: threading.Thread | None = None

    def foresee(self, model: SavedModel, rows: int, steps: int) -> None:
        """Has a shape compiled once there is nothing more urgent."""
        self._put(_FORESEEN, model, rows, steps)

    def ask(self, model: SavedModel, rows: int, steps: int) -> None:
        """Has a shape compiled soon: somebody just ran it plain. Cheap, may be repeated."""
        self._put(_ASKED_FOR, model, rows, steps)

    def forget(self, key: VersionKey) -> None:
        """A version is unloaded: nothing more of it is compiled, unless it is loaded again."""
        with self._changed:
            self._queue = [entry for entry in self._queue if entry[2].key != key]
            heapq.heapify(self._queue)
            self._known = {shape: urgency for shape, urgency in self._known.items() if shape[0] != key}
            self._given_up.discard(key)

    def wait_idle(self, limit: float) -> bool:
        """Waits until everything is compiled; returns whether that came within ``limit`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self._closed or not (self._queue or self._busy), limit)

    def close(self) -> None:
        """Forgets what is queued, and waits a moment for what is under way."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(_PATIENCE_S)

    def _put(self, urgency: int, model: SavedModel, rows: int, steps: int) -> None:
        shape = (model.key, rows, steps)
        # Read without the lock: almost always there is nothing to do.
        if self._known.get(shape, _FORESEEN + 1) <= urgency or model.key in self._given_up:
            return
        with self._changed:
            if self._closed:
                return
            self._known[shape] = urgency
            self._count += 1
            heapq.heappush(self._queue, (urgency, self._count, model, (rows, steps)))
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="compiler", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        begin_thread("compiler", _NICENESS)
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                _, _, model, (rows, steps) = heapq.heappop(self._queue)
                self._busy = True
            if model.key not in self._given_up and not model.is_compiled(rows, steps):
                self._compile(model, rows, steps)

    def _compile(self, model: SavedModel, rows: int, steps: int) -> None:
        began = time.monotonic()
        try:
            model.compile(rows, steps)
        except ServiceError as error:
            self._given_up.add(model.key)
            _log.warning("%s stays uncompiled: %s", model.key, error.message)
        except Exception:  # noqa: BLE001 - without this thread nothing would be compiled any more
            self._given_up.add(model.key)
            _log.exception("%s stays uncompiled", model.key)
        else:
            seconds = round(time.monotonic() - began, 2)
            _log.info("compiled", extra={"version": str(model.key), "rows": rows, "steps": steps, "seconds": seconds})
