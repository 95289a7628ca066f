"""The lifecycle of model versions as everybody may see it: what GetModelStatus tells."""

import enum
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from service.model_server.errors import ServingError


class State(enum.IntEnum):
    """``ModelVersionStatus.State``, number by number."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


@dataclass(frozen=True, slots=True)
class VersionState:
    """Where a version stands; ``error`` says why it could not be loaded, ``sequence`` when this became so."""

    state: State
    error: ServingError | None
    sequence: int


class StateMonitor:
    """The last state of every version that there ever was. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._states: dict[str, dict[int, VersionState]] = {}
        self._sequence = 0
        self._closed = False

    def publish(self, name: str, version: int, state: State, error: ServingError | None = None) -> None:
        """Tells a new state."""
        with self._changed:
            self._sequence += 1
            self._states.setdefault(name, {})[version] = VersionState(state, error, self._sequence)
            self._changed.notify_all()

    def versions(self, name: str) -> dict[int, VersionState]:
        """A model's versions, newest first; empty for a model that never had one."""
        with self._changed:
            return dict(sorted(self._states.get(name, {}).items(), reverse=True))

    def sequence(self) -> int:
        """The number of the latest change: what comes later has a higher one."""
        with self._changed:
            return self._sequence

    def wait_available(
        self, names: Collection[str], *, since: int, timeout: float | None = None
    ) -> dict[tuple[str, int], VersionState] | None:
        """Waits until each model has a version that became AVAILABLE, or failed to load, after change ``since``.

        Returns:
            The state that each model's version reached; None where the monitor was closed or the time was up.
        """
        limit = None if timeout is None else time.monotonic() + timeout
        with self._changed:
            while True:
                reached = [self._reached(name, since) for name in names]
                if all(entry is not None for entry in reached):
                    return dict(entry for entry in reached if entry is not None)
                remaining = None if limit is None else limit - time.monotonic()
                if self._closed or (remaining is not None and remaining <= 0):
                    return None
                self._changed.wait(remaining)

    def close(self) -> None:
        """Ends all waiting."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _reached(self, name: str, since: int) -> tuple[tuple[str, int], VersionState] | None:
        for version, state in sorted(self._states.get(name, {}).items(), reverse=True):
            # An END without an error is an older instance of the version on its way out, not a failed load.
            if state.sequence > since and (state.state is State.AVAILABLE or state.error is not None):
                return (name, version), state
        return None
