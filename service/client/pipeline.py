"""The heart of both clients: which step is sent when, with what, and what its answer means. It does no I/O.

Whoever drives it (``threads.py``, ``aio.py``) tells it what happened (a step was asked for, a message came, a stream
ended, time passed) and asks it what to do (the next message to send, when to wake up). So its rules can be tested
without a network or a clock, and the blocking and the asyncio client cannot differ in them:

- A step always says its position, and one step of a session is on its way at a time. A step that is behind one that
  fails is not sent: it would be applied where the other one belongs.
- Every step that is ready when a message is made goes into that message, with those that look like it as columns, once
  the gateway has said on this stream that it reads them.
- A step whose answer is lost is sent again with the same position: the gateway applies it once.
"""

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable

import grpc

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import errors, retry, wire
from service.client.blocks import Block
from service.client.columns import Sorter, read_outputs
from service.client.errors import GatewayError
from service.client.steps import Failure, Line, Step
from service.client.underway import UnderWay

# Seconds: steps are tried again at multiples of this.
_GRAIN = 0.01


class Pipeline:
    """Steps of any number of sessions on their way. Not thread-safe.

    Args:
        policy: How what fails is tried again.
        max_message_bytes: The size of message past which the steps that wait go into another one. A step that is
            larger by itself is sent alone, as a call of its own, so that it cannot take a stream down with it.
        clock: Seconds; only differences count.
    """

    def __init__(self, *, policy: retry.RetryPolicy, max_message_bytes: int, clock: Callable[[], float]) -> None:
        self._policy = policy
        self._max_message_bytes = max_message_bytes
        self._clock = clock
        self._under_way = UnderWay()
        self._ready, self._live = self._under_way.ready, self._under_way.live
        self._large: deque[Step] = deque()
        self._delayed: list[tuple[float, int, Step]] = []
        self._cancel: list[str] = []
        self._finished: list[Step | Block] = []
        self._next_expiry = math.inf
        self._streams = itertools.count(1)
        self._stream = 0
        self._columns_on = 0  # the stream on which the gateway reads columns
        self._breaks = 0
        self._open_at = -math.inf
        self._broken: GatewayError | None = None
        self._closed = ""

    # --- What the caller wants -------------------------------------------------------------------------------------

    def submit(self, step: Step | Block) -> None:
        """Takes a step on, or a block of them: it is sent once the steps of its session before it are through."""
        if isinstance(step, Block):
            whole = not self._closed and step.size <= self._max_message_bytes and self._under_way.take_block(step)
            self._next_expiry = min(self._next_expiry, step.deadline)
            for each in () if whole else step.split():
                self.submit(each)
            return
        line = step.line
        step.position = line.tail
        if self._closed or line.closed or line.failure is not None:
            step.error = self._refusal(step)
            if step.error is not None:
                self._finished.append(step)
                return
            line.failure = None
        line.tail += step.length
        self._live[step] = None
        if step.deadline < self._next_expiry:
            self._next_expiry = step.deadline
        if line.active is None:
            line.active = step
            self._make_ready(step)
        else:
            line.waiting.append(step)

    def cancel(self, step: Step | Block) -> None:
        """Gives a step up, and tells the gateway if it is there. Whether it was applied shows when it is repeated."""
        if isinstance(step, Block):
            if step.name in self._under_way.blocks:
                self._under_way.break_up(step)
            for each in step.split():
                self.cancel(each)
            return
        cancelled = GatewayError(grpc.StatusCode.CANCELLED, "the step was cancelled", reason="CANCELLED")
        line = step.line
        if step in self._live:
            self._give_up(step, cancelled)
        elif step.outputs is not None and line.position == line.tail == step.position + step.length:
            # It was through already, but its caller went away without the outputs: as if the answer had been lost.
            line.position = line.tail = step.position
            step.outputs, step.error = None, cancelled

    def close_line(self, line: Line, reason: str) -> None:
        """Takes no more steps of a session; those on their way and waiting fail."""
        line.closed = reason
        if isinstance(line.active, Block):
            self._under_way.break_up(line.active)
        if isinstance(line.active, Step):
            self._give_up(line.active, errors.closed(reason))

    def close(self, reason: str) -> None:
        """Takes no more steps at all; those on their way and waiting fail."""
        self._closed = reason
        self.retire_stream()
        self._under_way.break_up(*self._under_way.blocks.values())
        for step in list(self._live):
            if not step.finished:
                self._give_up(step, errors.closed(reason))

    # --- What there is to do ---------------------------------------------------------------------------------------

    @property
    def stream(self) -> int:
        """The stream that steps are sent on; 0 where one has to be opened."""
        return self._stream

    def wants_stream(self) -> bool:
        """Whether a stream has to be opened now: steps are ready and there is none."""
        return bool(self._ready) and not (self._stream or self._closed) and self._clock() >= self._open_at

    def has_message(self) -> bool:
        """Whether ``take`` has something to send."""
        return bool(self._stream) and bool(self._ready or self._cancel)

    def open_stream(self) -> int:
        """Says that a stream is being opened; returns its number."""
        self._stream = next(self._streams)
        return self._stream

    def retire_stream(self) -> None:
        """Sends nothing more on the present stream. What was sent on it is still answered on it."""
        self._stream = 0
        self._cancel.clear()  # cancels belong to the stream that carried the step

    def take(self, stream: int) -> pb.StreamStepsRequest | None:
        """The next message to send on ``stream``: all that is ready, up to the size limit; None where nothing is."""
        if stream != self._stream or not (self._ready or self._cancel):
            return None
        now, message, ready = self._clock(), pb.StreamStepsRequest(), self._ready
        if len(ready) == 1 and not self._cancel and isinstance(step := ready[0], Step):  # what follows, in short
            ready.popleft()
            if step.finished:
                return None
            self._under_way.fill(message.requests.add(), step, stream, now)
            return message
        message.cancel.extend(self._cancel)
        self._cancel.clear()
        room = self._max_message_bytes
        alike = Sorter(now, columns=stream == self._columns_on)
        if not alike.columns:
            self._under_way.break_up_on(0)
        while ready:
            step = ready[0]
            if not step.finished:
                room -= step.size
                if room < 0:
                    break
                alike.add(step)
            ready.popleft()
        for look, steps in alike.alike.items():
            if look is not None and (len(steps) > 1 or isinstance(steps[0], Block)):
                self._under_way.fill_columns(message.columns.add(), look, steps, stream)
                continue
            for step in steps:
                if isinstance(step, Step):
                    self._under_way.fill(message.requests.add(), step, stream, now)
        return message if alike.alike or message.cancel else None

    def take_large(self) -> pb.StepRequest | None:
        """A step to be sent alone, as a call of its own; None where there is none."""
        while self._large:
            step = self._large.popleft()
            if not step.finished:
                request = pb.StepRequest()
                self._under_way.fill(request, step, 0, self._clock())
                return request
        return None

    def wake_at(self) -> float:
        """When ``tick`` has something to do next, on the clock; infinity where never."""
        due = self._delayed[0][0] if self._delayed else math.inf
        opening = self._open_at if self._ready and not self._stream else math.inf
        return min(self._next_expiry, due, opening)

    def take_finished(self) -> list[Step | Block]:
        """The steps and blocks that got their outcome since the last call: their ``done`` is for the driver to call."""
        finished, self._finished = self._finished, []
        return finished

    # --- What happened ---------------------------------------------------------------------------------------------

    def received(self, message: pb.StreamStepsResponse, stream: int) -> None:
        """A message came on a stream."""
        self._breaks = 0
        self._broken = None
        if message.takes_columns:
            self._columns_on = stream
        for response in message.responses:
            self.answered(response, stream)
        for results in message.columns:
            self._answered_columns(results)

    def answered(self, response: pb.StepResponse, stream: int = 0) -> None:
        """A step was answered, in a stream or (0) in a call of its own."""
        step = self._under_way.take_sent(response.request_id)
        if step is None:  # given up meanwhile
            return
        if response.HasField("status"):
            self._refused(step, errors.from_status(response.status), stream)
            return
        end = step.position + step.length
        try:
            outputs = wire.to_outputs(response, end)
        except ValueError as error:
            self._fail(step, errors.nonsense(error))
        else:
            self._succeed(step, outputs, end)

    def refused(self, request_id: str, error: GatewayError) -> None:
        """A step that was sent alone failed."""
        step = self._under_way.take_sent(request_id)
        if step is not None:
            self._refused(step, error, 0)

    def stream_ended(self, stream: int, error: GatewayError | None) -> None:
        """A stream ended, with an error or (None) in order. What was not answered on it is sent on another."""
        current = stream == self._stream
        if current:
            self.retire_stream()
        lost = self._under_way.take_lost(stream)
        if not (current or lost) or (error is None and not lost):
            return
        error = error or GatewayError(grpc.StatusCode.UNAVAILABLE, "the gateway ended the stream before its answers")
        self._breaks += 1
        self._broken = error
        self._open_at = self._clock() + self._policy.delay(self._breaks, error)
        repeats = retry.repeats_stream(error, self._breaks, self._policy)
        for step in lost:
            if repeats and self._open_at < step.deadline:
                self._ready.append(step)
            else:
                self._fail(step, error)
        if not repeats:
            self._under_way.break_up_on(0)
            ready = list(self._ready)
            self._ready.clear()
            for waiting in ready:
                if isinstance(waiting, Step) and not waiting.finished:
                    self._fail(waiting, error)

    def tick(self) -> None:
        """Time passed: what is due again gets ready, and what is past its deadline fails."""
        now = self._clock()
        while self._delayed and self._delayed[0][0] <= now:
            step = heapq.heappop(self._delayed)[2]
            if not step.finished:
                self._make_ready(step)
        if now >= self._next_expiry:
            self._under_way.break_up(*[block for block in self._under_way.blocks.values() if block.deadline <= now])
            for step in [step for step in self._live if step.deadline <= now]:
                if not step.finished:
                    self._give_up(step, errors.expired(self._broken))
            # Steps that end before this time leave it too early, never too late: a look for nothing, now and then.
            self._next_expiry = min((step.deadline for step in self._under_way), default=math.inf)

    # --- Within ----------------------------------------------------------------------------------------------------

    def _refusal(self, step: Step) -> GatewayError | None:
        """Why a step is not even taken on; None where it is."""
        line = step.line
        if self._closed or line.closed:
            return errors.closed(self._closed or line.closed)
        failure = line.failure
        if failure is None or failure.seen or step.same_as(failure.step):
            return None
        step.failure = failure
        return failure.behind()

    def _make_ready(self, step: Step) -> None:
        alone = step.size > self._max_message_bytes
        (self._large if alone else self._ready).append(step)

    def _answered_columns(self, results: pb.StepResultColumns) -> None:
        names, ends = list(results.request_ids), list(results.positions)
        try:
            outputs = read_outputs(results)
        except ValueError as error:
            for step in filter(None, [self._under_way.take_sent(name) for name in names]):
                self._fail(step, errors.nonsense(error))
            return
        at = 0
        while at < len(names) and self._under_way.blocks:
            block = self._under_way.block_of(names[at])
            first, count = block.matching(names, ends, at) if block is not None else (0, 0)
            if block is not None and count:
                self._settle(block, first, outputs[at : at + count])
            else:
                self._answered_row(names[at], ends[at], outputs[at])
            at += count or 1
        for name, end, row in zip(names[at:], ends[at:], outputs[at:], strict=True):
            self._answered_row(name, end, row)

    def _answered_row(self, request_id: str, position: int, row: wire.FloatArray) -> None:
        step = self._under_way.take_sent(request_id)
        if step is None:  # given up meanwhile
            return
        end = step.position + step.length
        if position == end:
            self._succeed(step, row.copy(), end)
        else:
            self._fail(step, errors.nonsense(wire.wrong_position(position, end)))

    def _settle(self, block: Block, first: int, outputs: wire.FloatArray) -> None:
        for line in block.settle(first, outputs):
            self._go_on(line)
        if not block.left:
            del self._under_way.blocks[block.name]
            self._finished.append(block)

    def _refused(self, step: Step, error: GatewayError, stream: int) -> None:
        """The gateway answered a step with an error: it is tried again later, or fails."""
        if error.reason == "DRAINING" and stream and stream == self._stream:
            # This gateway goes away: the next stream goes to another one, where there is a choice.
            self.retire_stream()
        step.attempts += 1
        due = self._clock() + self._policy.delay(step.attempts, error)
        due = math.ceil(due / _GRAIN) * _GRAIN  # so that steps refused together are sent again together
        if retry.repeats_step(error) and due < step.deadline:
            heapq.heappush(self._delayed, (due, next(self._under_way.ids), step))
        else:
            self._fail(step, error)

    def _give_up(self, step: Step, error: GatewayError) -> None:
        """Fails a step, wherever it is."""
        if self._under_way.take_sent(step.request_id) is not None and step.stream and step.stream == self._stream:
            self._cancel.append(step.request_id)
        if step.line.active is not step:
            self._drop_behind(step, error)
            return
        self._fail(step, error)

    def _drop_behind(self, step: Step, error: GatewayError) -> None:
        """Fails a step that waits behind others of its session, and all those behind it."""
        waiting = step.line.waiting
        dropped = list(itertools.dropwhile(lambda other: other is not step, waiting))
        for _ in dropped:
            waiting.pop()
        self._fail_all(dropped, error)

    def _fail(self, step: Step, error: GatewayError) -> None:
        """The step on its way fails. Those behind it were to begin where it ends: they fail too."""
        line = step.line
        failed = [step, *line.waiting]
        line.waiting.clear()
        line.active = None
        self._fail_all(failed, error)

    def _fail_all(self, steps: list[Step], error: GatewayError) -> None:
        """Fails the first of these steps with ``error``, and the others since they come after it."""
        first = steps[0]
        failure = first.line.failure = Failure(first, error)
        first.line.tail = first.position
        for step in steps:
            step.error = error if step is first else failure.behind()
            step.failure = failure
            del self._live[step]
        self._finished.extend(steps)

    def _succeed(self, step: Step, outputs: wire.FloatArray, end: int) -> None:
        line = step.line
        step.outputs = outputs
        line.position = end
        line.active = None
        del self._live[step]
        self._finished.append(step)
        if line.waiting:
            self._go_on(line)

    def _go_on(self, line: Line) -> None:
        """It is the turn of the step that has waited longest in a session."""
        line.active = step = line.waiting.popleft()
        self._make_ready(step)
