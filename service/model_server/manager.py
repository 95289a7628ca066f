"""Loads and unloads model versions, one at a time, so that a model always has a version to answer with.

It does what TensorFlow Serving's AspiredVersionsManager does with its availability-preserving policy: a new version is
loaded before the old one goes; a version that is going away takes no new request and waits for those under way; a
load that fails is tried again, and nothing else is loaded or unloaded meanwhile.
"""

import contextlib
import enum
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, Protocol, TypeVar

import grpc

from service.model_server.errors import ServingError, not_found
from service.model_server.states import State, StateMonitor

_log = logging.getLogger(__name__)


class Closable(Protocol):
    """A loaded version."""

    def close(self) -> None:
        """Frees it."""
        ...


class LoadPolicy(NamedTuple):
    """How often, and after how many seconds, a load that failed is tried again."""

    max_retries: int
    retry_interval: float


ServableT = TypeVar("ServableT", bound=Closable)


class Handle(NamedTuple, Generic[ServableT]):
    """A version that is kept loaded while it is in use."""

    name: str
    version: int
    servable: ServableT


class _Stage(enum.Enum):
    NEW = enum.auto()
    READY = enum.auto()
    FAILED = enum.auto()


@dataclass(slots=True)
class _Version(Generic[ServableT]):
    path: Path
    stage: _Stage = _Stage.NEW
    aspired: bool = True
    servable: ServableT | None = None
    in_use: int = 0


class ModelManager(Generic[ServableT]):
    """Keeps what is loaded in step with what is aspired to. One thread of its own loads and unloads.

    Args:
        load: Loads ``(model name, version, directory)``; raises ServingError.
        monitor: Is told every state.
        policy: What happens when a load fails.
    """

    def __init__(
        self, load: Callable[[str, int, Path], ServableT], *, monitor: StateMonitor, policy: LoadPolicy
    ) -> None:
        self._load = load
        self._monitor = monitor
        self._policy = policy
        self._wake = threading.Condition()
        self._versions: dict[str, dict[int, _Version[ServableT]]] = {}
        self._pending: dict[str, Mapping[int, Path]] = {}
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="model-manager", daemon=True)
        self._thread.start()

    def aspire(self, name: str, versions: Mapping[int, Path]) -> None:
        """Says which versions of a model should be loaded, and from where; the rest of them go. Returns at once."""
        with self._wake:
            self._pending[name] = dict(versions)
            self._wake.notify_all()

    @contextlib.contextmanager
    def use(self, name: str, version: int | None) -> Iterator[Handle[ServableT]]:
        """Holds a version, the newest where none is named.

        Raises:
            ServingError: NOT_FOUND: it is not available.
        """
        with self._wake:
            handle, entry = self._find(name, version)
            entry.in_use += 1
        try:
            yield handle
        finally:
            with self._wake:
                entry.in_use -= 1
                self._wake.notify_all()

    def close(self, timeout: float) -> None:
        """Stops loading and frees what is loaded; gives up waiting for requests after ``timeout`` seconds."""
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join(timeout)
        with self._wake:
            idle = [entry for entries in self._versions.values() for entry in entries.values() if not entry.in_use]
            self._versions.clear()
        for entry in idle:
            if entry.servable is not None:
                entry.servable.close()

    def _find(self, name: str, version: int | None) -> tuple[Handle[ServableT], _Version[ServableT]]:
        entries = self._versions.get(name, {})
        for number in sorted(entries, reverse=True) if version is None else [version]:
            entry = entries.get(number)
            if entry is not None and entry.servable is not None:
                return Handle(name, number, entry.servable), entry
        request = f"Latest({name})" if version is None else f"Specific({name}, {version})"
        raise not_found(f"Servable not found for request: {request}")

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._stopping and not (self._take_pending() or self._next_unload() or self._next_load()):
                    self._wake.wait()
                if self._stopping:
                    return
                unload, load = self._next_unload(), self._next_load()
            if unload is not None:
                self._unload_version(*unload)
            elif load is not None:
                self._load_version(*load)

    def _take_pending(self) -> bool:
        """Makes what was asked for the aim; returns whether anything changed. A version on its way out stays so."""
        changed = False
        for name, wanted in list(self._pending.items()):
            entries = self._versions.setdefault(name, {})
            if any(number in wanted and not entry.aspired for number, entry in entries.items()):
                continue  # it is taken up again once that version is gone
            del self._pending[name]
            for number, entry in list(entries.items()):
                if number not in wanted:
                    entry.aspired = False
                    changed = True
                    if entry.stage is not _Stage.READY:
                        self._forget(name, number, entry)
            for number in sorted(wanted.keys() - entries.keys()):
                entries[number] = _Version(wanted[number])
                self._monitor.publish(name, number, State.START)
                changed = True
        return changed

    def _forget(self, name: str, number: int, entry: _Version[ServableT]) -> None:
        del self._versions[name][number]
        if entry.stage is _Stage.NEW:
            self._monitor.publish(name, number, State.END)

    def _next_unload(self) -> tuple[str, int] | None:
        """A version that may go: nothing is aspired to for its model, or something of that is ready."""
        for name, entries in self._versions.items():
            aspired = [entry for entry in entries.values() if entry.aspired]
            if aspired and not any(entry.stage is _Stage.READY for entry in aspired):
                continue
            for number, entry in sorted(entries.items()):
                if not entry.aspired and entry.stage is _Stage.READY:
                    return name, number
        return None

    def _next_load(self) -> tuple[str, int] | None:
        """The newest version that is to be loaded, of the first model that has one."""
        for name, entries in self._versions.items():
            new = [number for number, entry in entries.items() if entry.aspired and entry.stage is _Stage.NEW]
            if new:
                return name, max(new)
        return None

    def _load_version(self, name: str, number: int) -> None:
        entry = self._versions[name][number]
        self._monitor.publish(name, number, State.LOADING)
        for attempt in range(self._policy.max_retries + 1):
            try:
                servable = self._load(name, number, entry.path)
            except ServingError as error:
                _log.error("loading {name: %s version: %d} failed: %s", name, number, error)
                failure = error
            except Exception as error:  # noqa: BLE001 - the thread that loads must live on
                _log.exception("loading {name: %s version: %d} failed", name, number)
                failure = ServingError(grpc.StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
            else:
                with self._wake:
                    entry.servable, entry.stage = servable, _Stage.READY
                self._monitor.publish(name, number, State.AVAILABLE)
                _log.info("loaded {name: %s version: %d}", name, number)
                return
            if attempt < self._policy.max_retries and not self._wait_for_retry(name, number):
                break
        entry.stage = _Stage.FAILED
        self._monitor.publish(name, number, State.END, failure)

    def _wait_for_retry(self, name: str, number: int) -> bool:
        """Waits; returns False once nobody wants the version any more."""

        def given_up() -> bool:
            return self._stopping or (name in self._pending and number not in self._pending[name])

        with self._wake:
            return not self._wake.wait_for(given_up, self._policy.retry_interval)

    def _unload_version(self, name: str, number: int) -> None:
        with self._wake:
            entry = self._versions[name][number]
            servable, entry.servable = entry.servable, None  # no new request finds it
        self._monitor.publish(name, number, State.UNLOADING)
        with self._wake:
            self._wake.wait_for(lambda: self._stopping or entry.in_use == 0)
            if entry.in_use:
                return
            del self._versions[name][number]
        if servable is not None:
            servable.close()
        self._monitor.publish(name, number, State.END)
        _log.info("unloaded {name: %s version: %d}", name, number)
