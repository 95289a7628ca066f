"""One model version's queues, and the workers that make batches of what waits in them.

A worker drops what was cancelled or has expired, takes up to ``max_batch_size`` slices of at most
``max_steps_per_turn`` time steps, pads them to a bucket, calls the executor once and splits the result once. A chunk
that has time steps left goes to the end of its queue with the state that it has reached.

Chunks that one turn can finish and longer ones wait in queues of their own, and run in batches of their own. The short
ones go first. As long as they keep coming, the long ones leave a worker free for them and their batches have half the
rows, so that a one-step request never waits for a 500-step one, nor for a hundred of them; every fourth batch is theirs
all the same, so that no flood of short ones stops them. In either queue callers take turns: nobody waits for another's
whole flood.
"""

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from service.chunk import Chunk
from service.errors import BadModelOutput, DeadlineExceeded, ExecutorUnavailable, ServiceError
from service.executors import Eager, Executor
from service.fair_queue import FairQueue
from service.observing import BatchRun, Observer
from service.types import BoolArray, ModelVersion, StepBatch, StepBatchResult, all_finite, empty_batch

_log = logging.getLogger(__name__)

# So many batches of short chunks may overtake the long ones that wait.
_OVERTAKING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """How batches are formed.

    Attributes:
        max_batch_size: The most rows of a batch.
        max_steps_per_turn: The most time steps of a chunk that run in one batch.
        executor_timeout: Seconds that one executor call may take.
        shared_seconds: So long after the last chunk that one turn finishes, the next are expected: longer ones run on
            all workers but one, half as many rows at a time.
        shared_steps: The most that a longer one runs at a turn meanwhile where there is one worker alone.
    """

    max_batch_size: int
    max_steps_per_turn: int
    executor_timeout: float
    shared_seconds: float = 0.0
    shared_steps: int = 2


class _Ran(NamedTuple):
    """A batch that was run: its items, and what came of it, one of the two."""

    items: Sequence[Chunk]
    result: StepBatchResult | None
    error: ServiceError | None


class _Call:
    """A batch that runs: its items, what is running, and the timer that puts an end to it."""

    __slots__ = ("batch", "began", "expired", "items", "limit", "running")

    running: asyncio.Future[StepBatchResult]
    limit: asyncio.TimerHandle

    def __init__(self, items: Sequence[Chunk], began: float) -> None:
        self.items = items
        self.began = began
        self.batch: StepBatch | None = None
        self.expired = False

    def expire(self) -> None:
        """It has taken too long."""
        self.expired = True
        self.running.cancel()


class Lane:
    """One model version's queues, and the workers that empty them."""

    def __init__(
        self,
        executor: Executor,
        version: ModelVersion,
        policy: BatchPolicy,
        clock: Callable[[], float],
        observer: Observer,
        timer: Callable[[], float],
    ) -> None:
        self._executor = executor
        self._eager = executor if isinstance(executor, Eager) else None
        self._version = version
        self._policy = policy
        self._max_rows = min(policy.max_batch_size, executor.max_rows or policy.max_batch_size)
        self._clock = clock
        self._observer = observer
        self._timer = timer
        self._short: FairQueue[Chunk] = FairQueue()  # one turn finishes them
        self._long: FairQueue[Chunk] = FairQueue()
        self._short_until = -math.inf  # as long as short ones are to be reckoned with
        self._overtaken = 0  # batches of short ones that long ones have waited for
        self._long_batches = 0  # under way
        self._gone = 0  # at most so many of those that wait were cancelled
        self._filled = asyncio.Event()
        self._workers = [
            asyncio.create_task(self._work(), name=f"batcher {version.key} #{number}")
            for number in range(executor.max_in_flight)
        ]

    @property
    def fingerprint(self) -> str:
        """Of the model that it runs."""
        return self._version.fingerprint

    @property
    def queued(self) -> int:
        """Rows of chunks that wait; those that were cancelled may be among them."""
        return len(self._short) + len(self._long)

    def put(self, item: Chunk) -> None:
        """Has a chunk wait for its turn, the first one or the next."""
        # A long chunk stays among the long ones to its end: what is left of it must not queue behind a flood.
        item.since = self._timer()
        short = not item.taken and item.left <= self._policy.max_steps_per_turn
        if short:
            self._short_until = self._clock() + self._policy.shared_seconds
        (self._short if short else self._long).append(item)
        item.waits = True
        if not self._filled.is_set():
            self._filled.set()

    def left(self) -> None:
        """Somebody gave up a row that waits: its place in the queue is let go soon."""
        self._gone += 1
        if 2 * self._gone > self.queued:
            for queue in (self._short, self._long):
                queue.keep(Chunk.sift)
            self._gone = 0

    async def close(self) -> None:
        """Ends the workers, and fails what waits."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for item in (*self._short, *self._long):
            item.fail(ExecutorUnavailable("the model went away before the step could run"))

    async def _work(self) -> None:
        """Forms a batch and runs it, over and over; hands out the results of one while the next one runs."""
        ran: _Ran | None = None
        try:
            while True:
                items, long = self._form()
                if not items:
                    self._filled.clear()
                call = self._begin(items) if items else None
                if ran is not None:
                    handed, ran = ran, None
                    await self._hand_out(handed)
                    del handed  # what waits for the next batch must not hold on to the last one
                if call is None:
                    await self._filled.wait()
                else:
                    ran = await self._end(call)
                    self._long_batches -= long
                    del items, call
        finally:
            if ran is not None:
                await self._hand_out(ran)

    def _begin(self, items: Sequence[Chunk]) -> "_Call":
        """Has the executor run one slice of each item, from now on."""
        loop = asyncio.get_running_loop()
        call = _Call(items, self._timer())
        try:
            call.batch = batch = self._gather(items)
            if self._eager is not None:
                call.running = self._eager.begin(self._version.key, batch)
            else:
                call.running = loop.create_task(self._executor.step(self._version.key, batch))
        except Exception as error:  # noqa: BLE001 - told when it ends, like all that goes wrong later
            call.running = loop.create_future()
            call.running.set_exception(error)
        call.limit = loop.call_later(self._policy.executor_timeout, call.expire)
        return call

    async def _end(self, call: "_Call") -> _Ran:
        """What becomes of a call; what goes wrong is part of it.

        Raises:
            asyncio.CancelledError: the lane closes; its items have been told.
        """
        result, error = None, None
        try:
            result = await call.running
            if call.batch is not None:
                _check_shapes(self._version, call.batch, result)
        except ServiceError as failure:
            # Without its frames: one of them is this one, and all of the batch would wait for the garbage collector.
            result, error = None, failure.with_traceback(None)
        except asyncio.CancelledError:
            if not call.expired:
                for item in call.items:
                    item.fail(ExecutorUnavailable("the gateway closed while the step ran"))
                raise
            error = ExecutorUnavailable(f"the model did not answer within {self._policy.executor_timeout} s")
        except Exception as failure:  # noqa: BLE001 - a worker that died would leave its lane hanging for good
            _log.exception("executor failed on %s", self._version.key)
            failure.with_traceback(None)
            result, error = None, BadModelOutput(f"the model failed: {type(failure).__name__}")
        finally:
            call.limit.cancel()
            if call.batch is not None:
                self._observer.batch_ran(self._ran(call.items, call.batch, call.began, failed=result is None))
        return _Ran(call.items, result, error)

    async def _hand_out(self, ran: _Ran) -> None:
        """Resolves the items that are through, queues the others again, and fails what has to fail."""
        if isinstance(ran.error, BadModelOutput) and _rows(ran.items) > 1:
            # One row fails, not its batch: the halves are run again, down to single rows.
            for half in _halves(ran.items):
                await self._hand_out(await self._end(self._begin(half)))
            return
        if ran.result is None:
            for item in ran.items:
                item.fail(ran.error or AssertionError("no result and no error"))
            return
        bad = _bad_rows(ran.result, _rows(ran.items))
        begin = 0
        for item in ran.items:
            end = begin + item.size
            outputs, states = ran.result.outputs[begin:end, : item.turn], ran.result.state[begin:end]
            if bad is not None and bad[begin:end].any():
                good = [at for at in range(item.size) if not bad[begin + at]]
                lost = [row for at, row in enumerate(item.rows) if bad[begin + at]]
                item.outcome.set_exception(lost, BadModelOutput("the model answered NaN or Inf for this step"))
                item.keep(good)
                outputs, states = outputs[good], states[good]
            if item.size:
                item.advance(outputs, states)
            begin = end

    def _form(self) -> tuple[list[Chunk], bool]:
        """Takes the next batch off the queues, and gives each item its turn; it may be empty. Tells if of long ones."""
        expected = bool(self._short) or self._clock() < self._short_until
        may_run_long = not expected or self._long_batches < max(1, len(self._workers) - 1)
        long = may_run_long and (self._overtaken >= _OVERTAKING or not self._short)
        items = self._form_long(expected) if long else self._form_short()
        if not items and may_run_long:  # what was to come first has been cancelled
            long = not long
            items = self._form_long(expected) if long else self._form_short()
        if items:
            now = self._timer()
            waits = [now - item.since for item in items for _ in item.rows]
            self._observer.batch_formed(self._version.key, waits)
        if self._long and not expected:
            self._filled.set()  # the worker that was kept free is needed again
        return items, long

    def _form_short(self) -> list[Chunk]:
        items = self._take(self._short, self._max_rows)
        for item in items:
            item.turn = item.left
        self._overtaken += bool(items and self._long)
        return items

    def _form_long(self, expected: bool) -> list[Chunk]:
        """``expected``: short ones may come while it runs, and what is done for each of its rows keeps them waiting."""
        rows, turn = self._max_rows, self._policy.max_steps_per_turn
        if expected:
            rows = max(1, rows // 2)
            turn = turn if len(self._workers) > 1 else min(turn, self._policy.shared_steps)
        items = self._take(self._long, rows)
        for item in items:
            item.turn = min(turn, item.left)
        self._overtaken = 0
        self._long_batches += bool(items)
        return items

    def _take(self, queue: FairQueue[Chunk], count: int) -> list[Chunk]:
        """Up to ``count`` rows that somebody still waits for, of each caller about as many."""
        now = self._clock()
        taken: list[Chunk] = []
        while queue and count > 0:
            item = queue.take(max(1, count // queue.callers))
            if not item.sift():  # cancelled by their callers
                continue
            if item.deadline <= now:
                item.fail(DeadlineExceeded("the step's time limit passed while it waited to run"))
                continue
            item.waits = False
            taken.append(item)
            count -= item.size
        return taken

    def _ran(self, items: Sequence[Chunk], batch: StepBatch, began: float, *, failed: bool) -> BatchRun:
        rows, steps, _ = batch.inputs.shape
        asked = sum(item.turn * item.size for item in items)
        return BatchRun(self._version.key, _rows(items), asked, rows * steps, self._timer() - began, failed)

    def _gather(self, items: Sequence[Chunk]) -> StepBatch:
        """Pads one slice of each item to the executor's bucket: one copy in for each row."""
        used = _rows(items)
        rows, steps = self._executor.bucket(used, max(item.turn for item in items))
        origins = tuple(item.origin for item in items for _ in item.rows)
        batch = empty_batch(rows, steps, self._version.input_dim, self._version.state_size, origins)
        begin = 0
        for item in items:
            end = begin + item.size
            batch.lengths[begin:end] = item.turn
            item.gather(batch.inputs[begin:end], batch.state[begin:end], batch.reset[begin:end])
            begin = end
        # Padding rows step nothing; the initial state is one that every model can be relied on to handle.
        batch.reset[used:] = True
        batch.state[used:] = 0
        return batch


def _rows(items: Sequence[Chunk]) -> int:
    return sum([item.size for item in items])


def _halves(items: Sequence[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """Half of the rows of some chunks, and the other half."""
    room = _rows(items) // 2
    first: list[Chunk] = []
    second: list[Chunk] = []
    for item in items:
        if item.size <= room:
            first.append(item)
            room -= item.size
            continue
        if room:
            first.append(item.split(room))
            room = 0
        second.append(item)
    return first, second


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
    if result.finite or all_finite(result.outputs[:rows], result.state[:rows]):
        return None
    bad = np.zeros(rows, np.bool_)
    for row in range(rows):
        bad[row] = not (np.isfinite(result.outputs[row]).all() and np.isfinite(result.state[row]).all())
    return bad
