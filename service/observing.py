"""What the gateway tells of its work while it does it: the parts call an ``Observer`` that they were given.

This one listens to nothing; ``metrics.Metrics`` counts. No method may fail, suspend or take long: they are called on
the event loop, some of them for every step.
"""

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from service.errors import ServiceError
from service.types import VersionKey


class BatchRun(NamedTuple):
    """One call of the executor.

    Attributes:
        key: The model version that it ran.
        rows: Sessions in it, padding apart.
        time_steps: Time steps that were asked for, over all rows.
        computed: Time steps that were computed for them: padded rows times padded time.
        seconds: How long the call took.
        failed: Whether it raised.
    """

    key: VersionKey
    rows: int
    time_steps: int
    computed: int
    seconds: float
    failed: bool


class Observer:
    """Hears what happens, and lets it pass."""

    def batch_formed(self, key: VersionKey, waits: Sequence[float]) -> None:
        """Chunks left the queue to run; each had waited for so many seconds since it, or its last turn, came."""

    def batch_ran(self, run: BatchRun) -> None:
        """The executor was called."""

    def steps_committed(self, key: VersionKey, count: int, seconds: float, commit_seconds: float) -> None:
        """So many steps were applied, each so long after it was taken on; its commit took the last of it."""

    def step_replayed(self, key: VersionKey) -> None:
        """A step that had been applied was sent again and got its stored reply."""

    def commit_refused(self, key: VersionKey, verdict: str) -> None:
        """The store refused a commit: the session was no longer what the step ran on."""

    def call_ended(self, rpc: str, code: str, seconds: float) -> None:
        """A call was answered, or a stream ended, with a status code."""

    def stream_opened(self, rpc: str) -> None:
        """A stream began; its end is a ``call_ended``."""

    def failed(self, error: BaseException) -> None:
        """A step or a call was refused or failed."""

    def sessions_counted(self, counts: Mapping[VersionKey, int] | None) -> None:
        """So many live sessions there are by version; None where the store could not be asked."""

    def versions_served(self, keys: Iterable[VersionKey]) -> None:
        """These are the versions that can be stepped."""

    def serving(self, *, now: bool) -> None:
        """Whether the gateway takes work, as its health tells it."""

    def loop_late(self, seconds: float) -> None:
        """The event loop came so many seconds later than asked."""


SILENT = Observer()


def reason_of(error: BaseException) -> str:
    """The reason of docs/api.md that a failure is counted under; INTERNAL for what should not have happened."""
    if isinstance(error, ServiceError):
        return error.reason
    return "CANCELLED" if isinstance(error, asyncio.CancelledError) else "INTERNAL"
