"""Continuous batching: steps of many sessions, run together, a time slice at a turn.

Each model version has a lane of its own (``service.lane``): its queues, and the batches that run of what
waits in them. There is no delay to fill a batch: while one runs, the next gathers.

The batcher knows neither sessions nor messages: inputs and a state go in, outputs and a state come out.
"""

import asyncio
import time
from collections.abc import Callable, Collection, Hashable, Sequence

from service.chunk import Chunk, Outcome
from service.executors import Executor
from service.lane import BatchPolicy, Lane
from service.observing import SILENT, Observer
from service.types import FloatArray, ModelVersion, VersionKey

__all__ = ["BatchPolicy", "Batcher", "Chunk", "Outcome"]


class Batcher:
    """Runs chunks in batches.

    Args:
        executor: What runs a batch.
        policy: How batches are formed.
        clock: The event loop's clock; deadlines are told on it.
        observer: Hears of every batch.
        timer: Seconds, finer than ``clock``: what durations are told by.
        origin: Asked in each caller's context what its chunk comes from, for ``StepBatch.origins``.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        policy: BatchPolicy,
        clock: Callable[[], float],
        observer: Observer = SILENT,
        timer: Callable[[], float] = time.perf_counter,
        origin: Callable[[], object] | None = None,
    ) -> None:
        self._executor = executor
        self._policy = policy
        self._clock = clock
        self._observer = observer
        self._timer = timer
        self._origin = origin
        self._lanes: dict[VersionKey, Lane] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def submit(
        self,
        version: ModelVersion,
        inputs: FloatArray,
        state: FloatArray | None,
        deadline: float,
        caller: str = "",
        *,
        source: Hashable = None,
    ) -> tuple[FloatArray, FloatArray]:
        """Runs one chunk from ``state`` on.

        Args:
            version: The model version to run it on.
            inputs: ``[time, input_dim]``, time at least 1.
            state: ``[state_size]``; None for the model's initial state. It is read, never written.
            deadline: On the event loop's clock; past it the chunk is dropped.
            caller: Who asks: callers take turns.
            source: What tells the chunks of one session from those of another.

        Returns:
            ``outputs`` ``[time, output_dim]`` and the state after them ``[state_size]``, both the caller's own.

        Raises:
            DeadlineExceeded: it was not through in time.
            BadModelOutput: the model answered NaN, Inf or a wrong shape for this chunk.
            ExecutorUnavailable, ModelVersionUnavailable: it could not be run.
        """
        future: asyncio.Future[tuple[FloatArray, FloatArray]] = asyncio.get_running_loop().create_future()
        chunk = self.put(version, inputs[None], [state], deadline, _One(future), caller, source=source)
        try:
            return await future
        finally:
            if future.cancelled():
                chunk.leave(0)
            del future, chunk  # both hold the error that holds this frame

    def put(
        self,
        version: ModelVersion,
        inputs: FloatArray,
        states: Sequence[FloatArray | None] | FloatArray,
        deadline: float,
        outcome: Outcome,
        caller: str = "",
        native: object = None,
        *,
        lone: bool = False,
        source: Hashable = None,
    ) -> Chunk:
        """Has chunks of as many time steps each run side by side; what comes of them goes to ``outcome``.

        Args:
            version: The model version to run them on.
            inputs: ``[rows, time, input_dim]``.
            states: ``[state_size]`` of each row; None for the model's initial state. Read, never written.
            deadline: On the event loop's clock; past it what has not run is dropped.
            outcome: Gets outputs and states, or errors as ``submit`` raises them, for each row.
            caller: Who asks.
            native: ``states`` as the executor has them (``StepBatch.native``), where they are an array.
            lone: No other chunk is about to come that might share a batch with these: ``outcome`` may be told before
                this returns. Else it is told later.
            source: As of ``submit``; of many rows, that of the first.
        """
        lane = self._lanes.get(version.key)
        if lane is None or lane.fingerprint != version.fingerprint:
            lane = self._open(version)
        chunk = Chunk(lane, inputs, states, deadline, outcome, caller, native)
        chunk.source = source
        if self._origin is not None:
            chunk.origin = self._origin()
        lane.put(chunk, lone=lone)
        return chunk

    def queued(self) -> dict[VersionKey, int]:
        """Rows that wait, by version."""
        # Of a copy: another thread may ask.
        return {key: lane.queued for key, lane in list(self._lanes.items())}

    def forget(self, key: VersionKey) -> None:
        """A version is served no more: lets go of what is kept for it, and fails what still waits for it."""
        lane = self._lanes.pop(key, None)
        if lane is not None:
            closing = asyncio.create_task(lane.close())
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Ends what runs and fails what still waits. Drain first."""
        for key in tuple(self._lanes):
            self.forget(key)
        await asyncio.gather(*self._closing)

    def _open(self, version: ModelVersion) -> "Lane":
        """A lane for a version; its number may have stood for another model before."""
        self.forget(version.key)
        self._lanes[version.key] = lane = Lane(
            self._executor, version, self._policy, self._clock, self._observer, self._timer
        )
        return lane


class _One:
    """The outcome of a chunk of one row: a future."""

    __slots__ = ("_future",)

    def __init__(self, future: asyncio.Future[tuple[FloatArray, FloatArray]]) -> None:
        self._future = future

    @property
    def gone(self) -> Collection[int]:
        return (0,) if self._future.done() else ()

    def set_results(self, rows: Sequence[int], outputs: FloatArray, states: FloatArray, native: object = None) -> None:
        if not self._future.done():
            self._future.set_result((outputs[0].copy(), states[0].copy()))

    def set_exception(self, rows: Sequence[int], error: BaseException) -> None:
        if not self._future.done():
            self._future.set_exception(error)
