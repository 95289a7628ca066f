"""Executors run the ``step`` signature of a model version. They hold no session and know no client."""

import asyncio
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from service.types import ModelVersion, StepBatch, StepBatchResult, VersionKey, VersionStatus


class Executor(Protocol):
    """Runs batches. ``embedded.py`` does so in this process, ``tf_serving.py`` through a model server."""

    @property
    def max_in_flight(self) -> int:
        """How many ``step`` calls for one model version are worth having under way at once."""
        ...

    @property
    def max_rows(self) -> int | None:
        """The most rows that one call is worth; None where larger batches are always better."""
        ...

    async def start(self) -> None:
        """Loads or finds the models; returns once every model has a version that can be stepped.

        Raises:
            ModelLoadError: nothing that could be served was found; the text says what was looked for, and where.
        """
        ...

    def versions(self) -> Mapping[VersionKey, ModelVersion]:
        """The versions that can be stepped now. Cheap: it is asked on every request."""
        ...

    def newest(self, model: str) -> VersionKey | None:
        """The version that new sessions of a model get; None where it takes none."""
        ...

    def statuses(self) -> Mapping[VersionKey, VersionStatus]:
        """Every version that is known of: those of ``versions``, and those that are loading or could not be loaded."""
        ...

    async def release(self, key: VersionKey) -> None:
        """A version has no session: where it takes no new ones either, what it holds may be let go."""
        ...

    def bucket(self, rows: int, steps: int) -> tuple[int, int]:
        """The ``(batch, time)`` shape to pad ``rows`` x ``steps`` to, so that compiled shapes stay few."""
        ...

    async def step(self, key: VersionKey, batch: StepBatch) -> StepBatchResult:
        """Runs one batch of the shape that ``bucket`` asked for.

        The arrays of ``batch`` are the executor's until it returns; the result's arrays are the caller's.

        Raises:
            ExecutorUnavailable: it cannot run now; nothing has been applied, and the same batch may be sent again.
            ModelVersionUnavailable: the version is no longer there.
            BadModelOutput: what came back has a shape or a dtype that breaks the contract.
        """
        ...

    async def close(self) -> None:
        """Waits for what is running, and lets go of everything. Safe to call twice."""
        ...


@runtime_checkable
class Eager(Protocol):
    """What an executor can do besides: begin a batch without a task, which has to wait for its turn on the loop."""

    @property
    def ahead(self) -> int:
        """How many more calls than ``max_in_flight`` may wait in the executor, so that it never waits for the next.

        What waits there has had its turn: worth it where a call takes a few milliseconds, and beginning one not much
        less.
        """
        ...

    def begin(self, key: VersionKey, batch: StepBatch, *, company: bool = False) -> asyncio.Future[StepBatchResult]:
        """``Executor.step``, which runs by the time that this returns, or has run.

        ``company`` says that rows of others are about to come, which share the next batch if this one leaves the event
        loop time to take them on.
        """
        ...
