"""Continuous batching: steps of many sessions, run together, a time slice at a turn.

Each model version has a lane of its own: a queue, and one or more workers that take turns at it. A worker drops what
was cancelled or has expired, takes up to ``max_batch_size`` slices of at most ``max_steps_per_turn`` time steps, pads
them to a bucket, calls the executor once and splits the result once. A chunk that has time steps left goes to the end
of the queue with the state that it has reached, so a one-step request never waits for a 500-step one. There is no
delay to fill a batch: while one runs, the next gathers.

The batcher knows neither sessions nor messages: inputs and a state go in, outputs and a state come out.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from service.errors import BadModelOutput, DeadlineExceeded, ExecutorUnavailable, ServiceError
from service.executors import Executor
from service.types import BoolArray, FloatArray, ModelVersion, StepBatch, StepBatchResult, VersionKey

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """How batches are formed.

    Attributes:
        max_batch_size: The most rows of a batch.
        max_steps_per_turn: The most time steps of a chunk that run in one batch.
        executor_timeout: Seconds that one executor call may take.
    """

    max_batch_size: int
    max_steps_per_turn: int
    executor_timeout: float


class Batcher:
    """Runs chunks in batches.

    Args:
        executor: What runs a batch.
        policy: How batches are formed.
        clock: The event loop's clock; deadlines are told on it.
    """

    def __init__(self, executor: Executor, *, policy: BatchPolicy, clock: Callable[[], float]) -> None:
        self._executor = executor
        self._policy = policy
        self._clock = clock
        self._lanes: dict[VersionKey, _Lane] = {}

    async def submit(
        self, version: ModelVersion, inputs: FloatArray, state: FloatArray | None, deadline: float
    ) -> tuple[FloatArray, FloatArray]:
        """Runs one chunk from ``state`` on.

        Args:
            version: The model version to run it on.
            inputs: ``[time, input_dim]``, time at least 1.
            state: ``[state_size]``; None for the model's initial state. It is read, never written.
            deadline: On the event loop's clock; past it the chunk is dropped.

        Returns:
            ``outputs`` ``[time, output_dim]`` and the state after them ``[state_size]``, both the caller's own.

        Raises:
            DeadlineExceeded: it was not through in time.
            BadModelOutput: the model answered NaN, Inf or a wrong shape for this chunk.
            ExecutorUnavailable, ModelVersionUnavailable: it could not be run.
        """
        lane = self._lanes.get(version.key)
        if lane is None:
            lane = self._lanes[version.key] = _Lane(self._executor, version, self._policy, self._clock)
        item = _Item(inputs, state, deadline, asyncio.get_running_loop().create_future())
        lane.put(item)
        return await item.future

    def queued(self) -> dict[VersionKey, int]:
        """Chunks that wait, by version."""
        return {key: lane.queued for key, lane in self._lanes.items()}

    async def close(self) -> None:
        """Ends the workers and fails what still waits. Drain first."""
        for lane in self._lanes.values():
            await lane.close()
        self._lanes.clear()


@dataclass(slots=True, eq=False)
class _Item:
    """A chunk on its way through: ``taken`` of its time steps have run and brought it to ``state``."""

    inputs: FloatArray
    state: FloatArray | None
    deadline: float
    future: asyncio.Future[tuple[FloatArray, FloatArray]]
    taken: int = 0
    outputs: list[FloatArray] = field(default_factory=list)

    def fail(self, error: ServiceError) -> None:
        if not self.future.done():
            self.future.set_exception(error)


class _Lane:
    """One model version's queue, and the workers that empty it."""

    def __init__(
        self, executor: Executor, version: ModelVersion, policy: BatchPolicy, clock: Callable[[], float]
    ) -> None:
        self._executor = executor
        self._version = version
        self._policy = policy
        self._clock = clock
        self._queue: deque[_Item] = deque()
        self._filled = asyncio.Event()
        self._workers = [
            asyncio.create_task(self._work(), name=f"batcher {version.key} #{number}")
            for number in range(executor.max_in_flight)
        ]

    @property
    def queued(self) -> int:
        return len(self._queue)

    def put(self, item: _Item) -> None:
        self._queue.append(item)
        self._filled.set()

    async def close(self) -> None:
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        while self._queue:
            self._queue.popleft().fail(ExecutorUnavailable("the gateway closed before the step could run"))

    async def _work(self) -> None:
        while True:
            await self._filled.wait()
            batch = self._form()
            if not self._queue:
                self._filled.clear()
            if batch:
                await self._run(batch)

    def _form(self) -> list[_Item]:
        """Takes the next batch off the queue; it may be empty."""
        now = self._clock()
        batch: list[_Item] = []
        while self._queue and len(batch) < self._policy.max_batch_size:
            item = self._queue.popleft()
            if item.future.done():  # cancelled by its caller
                continue
            if item.deadline <= now:
                item.fail(DeadlineExceeded("the step's time limit passed while it waited to run"))
                continue
            batch.append(item)
        return batch

    async def _run(self, items: Sequence[_Item]) -> None:
        """Runs one slice of each item; resolves those that are through and queues the others again."""
        try:
            result = await self._execute(items)
        except BadModelOutput as error:
            await self._isolate(items, error)
            return
        except ServiceError as error:
            for item in items:
                item.fail(error)
            return
        except asyncio.CancelledError:
            for item in items:
                item.fail(ExecutorUnavailable("the gateway closed while the step ran"))
            raise
        except Exception as error:  # noqa: BLE001 - a worker that died would leave its lane hanging for good
            _log.exception("executor failed on %s", self._version.key)
            await self._isolate(items, BadModelOutput(f"the model failed: {type(error).__name__}"))
            return
        bad = _bad_rows(result, len(items))
        for row, item in enumerate(items):
            if bad is not None and bad[row]:
                item.fail(BadModelOutput("the model answered NaN or Inf for this step"))
            elif not item.future.done():
                self._advance(item, result, row)

    async def _isolate(self, items: Sequence[_Item], error: ServiceError) -> None:
        """Fails the item that a batch failed for: runs its halves, down to single items."""
        if len(items) == 1:
            items[0].fail(error)
            return
        middle = len(items) // 2
        await self._run(items[:middle])
        await self._run(items[middle:])

    async def _execute(self, items: Sequence[_Item]) -> StepBatchResult:
        batch = self._gather(items)
        try:
            async with asyncio.timeout(self._policy.executor_timeout):
                result = await self._executor.step(self._version.key, batch)
        except TimeoutError:
            raise ExecutorUnavailable(f"the model did not answer within {self._policy.executor_timeout} s") from None
        _check_shapes(self._version, batch, result)
        return result

    def _slice(self, item: _Item) -> int:
        return min(len(item.inputs) - item.taken, self._policy.max_steps_per_turn)

    def _gather(self, items: Sequence[_Item]) -> StepBatch:
        """Pads one slice of each item to the executor's bucket: one copy in for each row."""
        slices = [self._slice(item) for item in items]
        rows, steps = self._executor.bucket(len(items), max(slices))
        batch = StepBatch(
            inputs=np.zeros((rows, steps, self._version.input_dim), np.float32),
            lengths=np.zeros(rows, np.int32),
            reset=np.zeros(rows, np.bool_),
            state=np.empty((rows, self._version.state_size), np.float32),
        )
        batch.lengths[: len(items)] = slices
        for row, (item, length) in enumerate(zip(items, slices, strict=True)):
            batch.inputs[row, :length] = item.inputs[item.taken : item.taken + length]
            if item.state is None:
                batch.reset[row] = True
                batch.state[row] = 0
            else:
                batch.state[row] = item.state
        # Padding rows step nothing; the initial state is one that every model can be relied on to handle.
        batch.reset[len(items) :] = True
        batch.state[len(items) :] = 0
        return batch

    def _advance(self, item: _Item, result: StepBatchResult, row: int) -> None:
        """Moves one item on by the slice that ran: one copy out, so that no session holds on to a whole batch."""
        length = self._slice(item)
        item.outputs.append(result.outputs[row, :length].copy())
        item.state = result.state[row].copy()
        item.taken += length
        if item.taken < len(item.inputs):
            self.put(item)
            return
        outputs = item.outputs[0] if len(item.outputs) == 1 else np.concatenate(item.outputs)
        item.future.set_result((outputs, item.state))


def _check_shapes(version: ModelVersion, batch: StepBatch, result: StepBatchResult) -> None:
    rows, steps, _ = batch.inputs.shape
    expected = ((rows, steps, version.output_dim), (rows, version.state_size))
    came = (result.outputs.shape, result.state.shape)
    if came != expected:
        raise BadModelOutput(
            f"model {version.key} answered outputs {came[0]} and state {came[1]}; "
            f"expected {expected[0]} and {expected[1]}"
        )


def _bad_rows(result: StepBatchResult, rows: int) -> BoolArray | None:
    """Which of the first ``rows`` rows hold NaN or Inf; None where none does."""
    # NaN and Inf survive a sum, so one pass that writes nothing finds them. A sum of finite values may overflow:
    # then the rows are looked at one by one.
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.sum(result.outputs[:rows]) + np.sum(result.state[:rows])
    if np.isfinite(total):
        return None
    bad = np.zeros(rows, np.bool_)
    for row in range(rows):
        bad[row] = not (np.isfinite(result.outputs[row]).all() and np.isfinite(result.state[row]).all())
    return bad if bad.any() else None
