"""One model version's queues, and the batches that are made of what waits in them.

As many batches run at once as the executor is worth. For the next one, what was cancelled or has expired is dropped, up
to ``max_batch_size`` slices of at most ``max_steps_per_turn`` time steps are taken and padded to a bucket, the executor
is called once, and the result is split once. A chunk that has time steps left goes to the end of its queue with the
state that it has reached.

Chunks that one turn can finish and longer ones wait in queues of their own, and run in batches of their own. The short
ones go first. As long as they keep coming, the long ones leave room for a batch of them and their batches have half the
rows, so that a one-step request never waits for a 500-step one, nor for a hundred of them; every fourth batch is theirs
all the same, so that no flood of short ones stops them. In either queue callers take turns: nobody waits for another's
whole flood.
"""

import asyncio
import contextvars
import functools
import itertools
import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from service.chunk import Chunk, extent_of, gather, halves_of, rows_of
from service.durations import MeanDuration
from service.errors import BadModelOutput, DeadlineExceeded, ExecutorUnavailable, ServiceError
from service.executors import Eager, Executor
from service.fair_queue import FairQueue
from service.kept_batch import KeptBatch
from service.model_output import bad_rows, check_shapes
from service.observing import BatchRun, Observer
from service.types import ModelVersion, StepBatch, StepBatchResult, tuple_of

_log = logging.getLogger(__name__)

# So many batches of short chunks may overtake the long ones that wait.
_OVERTAKING = 3
# A batch of at most so many rows x time steps is small, and brief where such batches take no longer than this.
_SMALL_CELLS = 64
_BRIEF_S = 3e-3
# Whose chunks are about to come is told by so many of those that came last.
_RECENT = 16
# Where batches take longer than this, it hardly matters how long the executor waits for the next one.
_AHEAD_S = 30e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPolicy:
    """How batches are formed.

    Attributes:
        max_batch_size: The most rows of a batch.
        max_steps_per_turn: The most time steps of a chunk that run in one batch.
        executor_timeout: Seconds that one executor call may take.
        shared_seconds: So long after the last chunk that one turn finishes, the next are expected: longer ones run in
            all batches at once but one, half as many rows at a time.
        shared_steps: The most that a longer one runs at a turn meanwhile where only one batch runs at once.
    """

    max_batch_size: int
    max_steps_per_turn: int
    executor_timeout: float
    shared_seconds: float = 0.0
    shared_steps: int = 2


class _Call:
    """A batch that runs: its items, what is running, and the timer that puts an end to it."""

    __slots__ = ("batch", "began", "brief", "expired", "extent", "items", "limit", "long", "running", "small")

    running: asyncio.Future[StepBatchResult]

    def __init__(self, items: Sequence[Chunk], began: float, *, long: bool) -> None:
        self.items = items
        self.extent = extent_of(items)
        self.began = began
        self.long = long
        self.batch: StepBatch | None = None
        self.limit: asyncio.TimerHandle | None = None
        self.expired = False
        self.small = self.brief = False

    def expire(self) -> None:
        """It has taken too long."""
        self.expired = True
        self.running.cancel()


class Lane:
    """One model version's queues, and the batches under way. Made and used on one event loop."""

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
        self._loop = asyncio.get_running_loop()
        # Of whoever has opened this lane, not of whoever fills it: nobody's own.
        self._context = contextvars.copy_context()
        self._most_calls = executor.max_in_flight
        self._calls: set[_Call] = set()
        self._ahead = 0 if self._eager is None else self._eager.ahead
        self._small, self._large = MeanDuration(10 * _BRIEF_S), MeanDuration(10 * _AHEAD_S)  # by the size of the batch
        self._halves: deque[list[Chunk]] = deque()  # of batches that failed as a whole
        self._recent: deque[Hashable] = deque(maxlen=_RECENT)  # the sources of those that came last
        self._kept_batch = KeptBatch(version)  # of chunks that are begun by themselves
        self._called = False  # ``go`` is, soon
        self._closed = False

    @property
    def fingerprint(self) -> str:
        """Of the model that it runs."""
        return self._version.fingerprint

    @property
    def queued(self) -> int:
        """Rows of chunks that wait; those that were cancelled may be among them."""
        return self._short.rows + self._long.rows

    def put(self, item: Chunk, *, lone: bool = False) -> None:
        """Has a chunk wait for its turn, the first one or the next.

        Args:
            item: The chunk.
            lone: No other is about to come that might share its batch: where it finds nothing before it, it is begun
                at once, and may be through when this returns.
        """
        if not item.taken:
            self._recent.append(item.source)
        if lone and self._begin_lone(item):
            return
        # A long chunk stays among the long ones to its end: what is left of it must not queue behind a flood.
        item.since = self._timer()
        short = not item.taken and item.left <= self._policy.max_steps_per_turn
        if short:
            self._short_until = self._clock() + self._policy.shared_seconds
        (self._short if short else self._long).append(item)
        item.waits = True
        self._go_soon()

    def _begin_lone(self, item: Chunk) -> bool:
        """Begins a batch of one chunk, short and with nothing before it: without the queue and what it is sorted by."""
        if self._calls or self._short.rows or self._long.rows or self._halves or self._called or self._closed:
            return False
        now = self._clock()
        if item.taken or item.left > self._policy.max_steps_per_turn or item.size > self._max_rows:
            return False
        if item.deadline <= now:  # as it is told where chunks are taken off their queue
            return False
        item.since = self._timer()
        item.turn = item.left
        self._short_until = now + self._policy.shared_seconds
        self._overtaken = 0
        self._observer.batch_formed(self._version.key, (0.0,) * item.size)
        call = self._begin((item,), long=False, lone=True)
        if call.running.done():
            self._hand_out(call, *self._end(call))
        return True

    def left(self) -> None:
        """Somebody gave up a row that waits: its place in the queue is let go soon."""
        self._gone += 1
        if 2 * self._gone > self.queued:
            for queue in (self._short, self._long):
                queue.keep(Chunk.sift)
            self._gone = 0

    def go(self) -> None:
        """Begins batches, as long as something waits and there is room for one. Called soon after each ``put``."""
        self._called = False
        while self._may_begin():
            items, long = (self._halves.popleft(), False) if self._halves else self._form()
            if not items:
                return
            call = self._begin(items, long=long)
            if call.running.done():
                # It was run here and now: whatever else there is to do comes before the next one.
                self._hand_out(call, *self._end(call))
                if self._short.rows or self._long.rows or self._halves:
                    self._go_soon()
                return

    def _may_begin(self) -> bool:
        calls, rows = len(self._calls), self._short.rows + self._long.rows
        if self._closed or not (self._halves or rows):
            return False
        if calls >= self._most_calls:
            # Ahead in the executor wait large batches of short chunks alone: there nothing could overtake the others.
            ahead = self._ahead if self._large.seconds <= _AHEAD_S else 0
            return calls < self._most_calls + ahead and 2 * self._short.rows >= self._max_rows
        # Beside a batch that is over so soon one of a few rows is not worth its price: they wait, and get more.
        return not calls or 2 * rows >= self._max_rows or not any(call.brief for call in self._calls)

    def _go_soon(self) -> None:
        if not (self._called or self._closed):
            self._called = True
            self._loop.call_soon(self.go, context=self._context)

    async def close(self) -> None:
        """Ends what runs, and fails what waits."""
        self._closed = True
        running = [call.running for call in self._calls]
        for call in running:
            call.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for item in (*self._short, *self._long, *itertools.chain.from_iterable(self._halves)):
            item.fail(ExecutorUnavailable("the model went away before the step could run"))

    def _begin(self, items: Sequence[Chunk], *, long: bool, lone: bool = False) -> _Call:
        """Has the executor run one slice of each item, from now on."""
        call = _Call(items, self._timer(), long=long)
        try:
            rows, turn, _ = call.extent
            bucket = self._executor.bucket(rows, turn)
            kept = self._kept_batch.take(items[0], bucket) if lone else None
            call.batch = batch = kept or gather(items, bucket, self._version)
            call.small = bucket[0] * turn <= _SMALL_CELLS
            # In another process it may hang, and others beside it need not: nothing waits for that.
            call.brief = self._eager is not None and call.small and self._small.seconds <= _BRIEF_S
            if self._eager is not None:
                # Of more sources than twice what is in it: the next ones are on their way while it runs.
                company = 2 * len(items) < _RECENT and len(set(self._recent)) > 2 * len(items)
                call.running = self._eager.begin(self._version.key, batch, company=company)
            else:
                call.running = self._loop.create_task(self._executor.step(self._version.key, batch))
        except Exception as error:  # noqa: BLE001 - told when it ends, like all that goes wrong later
            call.running = self._loop.create_future()
            call.running.set_exception(error)
        self._calls.add(call)
        if not call.running.done():
            call.limit = self._loop.call_later(self._policy.executor_timeout, call.expire, context=self._context)
            call.running.add_done_callback(functools.partial(self._ended, call), context=self._context)
        return call

    def _ended(self, call: _Call, running: asyncio.Future[StepBatchResult]) -> None:
        """The executor is through with a batch: the next one runs while the results of this one are handed out."""
        if call.limit is not None:
            call.limit.cancel()
        came = self._end(call)
        self.go()
        self._hand_out(call, *came)

    def _end(self, call: _Call) -> tuple[StepBatchResult | None, ServiceError | None]:
        self._calls.discard(call)
        self._long_batches -= call.long
        came = self._outcome(call)
        if call.batch is not None:
            ran = self._ran(call, call.batch, failed=came[0] is None)
            self._observer.batch_ran(ran)
            (self._small if call.small else self._large).note(ran.seconds)
        return came

    def _outcome(self, call: _Call) -> tuple[StepBatchResult | None, ServiceError | None]:
        """What came of a call, one of the two. Errors without their frames: these would keep all of the batch."""
        try:
            result = call.running.result()
            if call.batch is not None:
                check_shapes(self._version, call.batch, result)
        except ServiceError as error:
            return None, error.with_traceback(None)
        except asyncio.CancelledError:
            if call.expired:
                limit = self._policy.executor_timeout
                return None, ExecutorUnavailable(f"the model did not answer within {limit} s")
            return None, ExecutorUnavailable("the gateway closed while the step ran")
        except Exception as error:  # noqa: BLE001 - whatever it is, those who wait have to hear of it
            _log.exception("executor failed on %s", self._version.key)
            error.with_traceback(None)
            return None, BadModelOutput(f"the model failed: {type(error).__name__}")
        return result, None

    def _hand_out(self, call: _Call, result: StepBatchResult | None, error: ServiceError | None) -> None:
        """Resolves the items that are through, queues the others again, and fails what has to fail."""
        items = call.items
        if isinstance(error, BadModelOutput) and rows_of(items) > 1:
            # One row fails, not its batch: the halves are run again, down to single rows.
            self._halves.extend(halves_of(items))
            self._go_soon()
            return
        if result is None:
            for item in items:
                item.fail(error or AssertionError("no result and no error"))
            return
        bad = None if result.finite else bad_rows(result, rows_of(items))
        begin = 0
        for item in items:
            end = begin + item.size
            outputs, states = result.outputs[begin:end, : item.turn], result.state[begin:end]
            if bad is not None and bad[begin:end].any():
                good = [at for at in range(item.size) if not bad[begin + at]]
                lost = [row for at, row in enumerate(item.rows) if bad[begin + at]]
                item.outcome.set_exception(lost, BadModelOutput("the model answered NaN or Inf for this step"))
                item.keep(good)
                outputs, states = outputs[good], states[good]
            if item.size:
                item.advance(outputs, states, result.native if item.size == len(result.state) else None)
            begin = end
        self._kept_batch.give_back(call.batch)

    def _form(self) -> tuple[list[Chunk], bool]:
        """Takes the next batch off the queues, and gives each item its turn; it may be empty. Tells if of long ones."""
        if self._long.rows:
            items, long = self._form_either()
        else:
            items, long = self._form_short(), False
            self._overtaken = 0
        if items:
            now = self._timer()
            waits: list[float] = []
            for item in items:
                waits += [now - item.since] * item.size
            self._observer.batch_formed(self._version.key, waits)
        return items, long

    def _form_either(self) -> tuple[list[Chunk], bool]:
        """Of short ones, if there are any, or of long ones that wait."""
        expected = self._short.rows > 0 or self._clock() < self._short_until
        most = self._most_calls - 1 if expected else self._most_calls
        may_run_long = self._long_batches < max(1, most) and len(self._calls) < self._most_calls
        long = may_run_long and (self._overtaken >= _OVERTAKING or not self._short.rows)
        items = self._form_long(expected) if long else self._form_short()
        if not items and may_run_long:  # what was to come first has been cancelled
            long = not long
            items = self._form_long(expected) if long else self._form_short()
        return items, long

    def _form_short(self) -> list[Chunk]:
        items = self._take(self._short, self._max_rows)
        for item in items:
            item.turn = item.left
        self._overtaken += bool(items and self._long.rows)
        return items

    def _form_long(self, expected: bool) -> list[Chunk]:
        """``expected``: short ones may come while it runs, and what is done for each of its rows keeps them waiting."""
        rows, turn = self._max_rows, self._policy.max_steps_per_turn
        if expected:
            rows = max(1, rows // 2)
            turn = turn if self._most_calls > 1 else min(turn, self._policy.shared_steps)
        items = self._take(self._long, rows)
        for item in items:
            item.turn = min(turn, item.left)
        self._overtaken = 0
        self._long_batches += bool(items)
        return items

    def _take(self, queue: FairQueue[Chunk], count: int) -> list[Chunk]:
        """Up to ``count`` rows that somebody still waits for.

        First what fits into an equal share for each caller; what room is left goes to the next ones in turn, as much as
        each can use of it. Who has more than a share then gets a batch now and then, not a part of each: that is
        through sooner on the average, and those who are stepped together stay together.
        """
        now = self._clock()
        taken: list[Chunk] = []
        if queue.callers > 1:
            for item in queue.take_small(max(1, count // queue.callers), count):
                count -= self._took(item, now, taken)
                if count <= 0:
                    return taken
        while queue.rows and count > 0:
            count -= self._took(queue.take(count), now, taken)
        return taken

    def _took(self, item: Chunk, now: float, taken: list[Chunk]) -> int:
        """Adds a chunk that was taken off its queue to those that are to run; returns the number of its rows."""
        if not item.sift():  # cancelled by their callers
            return 0
        if item.deadline <= now:
            item.fail(DeadlineExceeded("the step's time limit passed while it waited to run"))
            return 0
        item.waits = False
        taken.append(item)
        return item.size

    def _ran(self, call: _Call, batch: StepBatch, *, failed: bool) -> BatchRun:
        rows, _, steps = call.extent
        padded, most, _ = batch.inputs.shape
        seconds = self._timer() - call.began
        return tuple_of(BatchRun, (self._version.key, rows, steps, padded * most, seconds, failed))
