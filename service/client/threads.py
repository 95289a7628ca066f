"""Drives a ``Pipeline`` with threads, for the blocking client.

Three threads at most do the work while a stream is open: gRPC's own, which asks for the next message to send; one that
reads the answers; and one that keeps time. Whoever calls in runs the pipeline under the lock, and what got its outcome
is told after the lock is let go, so that a callback may step again.
"""

import math
import os
import threading
import time
from collections.abc import Callable, Iterator

import grpc

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import calls, errors
from service.client.blocks import Block
from service.client.errors import GatewayError
from service.client.options import ClientOptions
from service.client.pipeline import Pipeline
from service.client.steps import Line, Step


class StepThreads:
    """Sends steps over one stream of a blocking channel at a time.

    Args:
        channel: Where to.
        options: How.
    """

    def __init__(self, channel: grpc.Channel, options: ClientOptions) -> None:
        self._options = options
        self._tracing = options.tracing()
        self._pipeline = Pipeline(
            policy=options.retry, max_message_bytes=options.max_message_bytes, clock=time.monotonic
        )
        self._lock = threading.Lock()
        self._to_send = threading.Condition(self._lock)
        self._alarm = threading.Condition(self._lock)
        self._alarm_at = -math.inf  # when the timekeeper wakes up; it sleeps for ever before it first runs
        self._timekeeper: threading.Thread | None = None
        self._sending_on = 0
        self._closed = False
        self._pid = os.getpid()
        self._stream_steps = channel.stream_stream(
            calls.STREAM_STEPS, pb.StreamStepsRequest.SerializeToString, pb.StreamStepsResponse.FromString
        )
        self._step = channel.unary_unary(calls.STEP, pb.StepRequest.SerializeToString, pb.StepResponse.FromString)

    def submit(self, step: Step | Block) -> None:
        """Takes a step on, or a block of them, in a process for which ``check_process`` holds."""
        if self._tracing is not None:
            self._tracing.begin(step)
        self._turn(self._pipeline.submit, step)

    @property
    def forked(self) -> bool:
        """Whether this is a copy in another process: its threads are gone, and its lock may be held for ever."""
        return os.getpid() != self._pid

    def check_process(self) -> None:
        """Refuses to work where nothing can.

        Raises:
            RuntimeError: this process was forked off from the one that made the client.
        """
        if self.forked:
            raise RuntimeError("a client does not survive fork(): make one in each process, after forking")

    def cancel(self, step: Step | Block) -> None:
        """Gives a step up, or a block of them, as far as there is no outcome yet."""
        self._turn(self._pipeline.cancel, step)

    def close_line(self, line: Line, reason: str) -> None:
        """Takes no more steps of a session."""
        self._turn(self._pipeline.close_line, line, reason)

    def close(self, reason: str) -> None:
        """Fails what has no outcome yet and ends the threads; the streams end with their channel."""
        self._turn(self._close, reason)

    def _close(self, reason: str) -> None:
        self._closed = True
        self._pipeline.close(reason)
        self._alarm.notify()

    def _turn(self, action: Callable[..., None], *arguments: object) -> None:
        """Tells the pipeline something under the lock; afterwards, what it wants done is done."""
        with self._lock:
            action(*arguments)
            self._wake()
            large = self._take_large()
            finished = self._pipeline.take_finished()
        for request in large:
            self._send_alone(request)
        for step in finished:
            if self._tracing is not None:
                self._tracing.end(step)
            step.done(step)

    def _wake(self) -> None:
        """Starts and wakes the threads that have something to do now."""
        pipeline = self._pipeline
        if pipeline.wants_stream():
            number = pipeline.open_stream()
            threading.Thread(target=self._read, args=(number,), name=f"ntm-client-{number}", daemon=True).start()
        if pipeline.has_message() or pipeline.stream != self._sending_on:
            self._sending_on = pipeline.stream
            self._to_send.notify_all()
        if not self._closed and self._timekeeper is None:
            self._timekeeper = threading.Thread(target=self._keep_time, name="ntm-client-time", daemon=True)
            self._timekeeper.start()
        if pipeline.wake_at() < self._alarm_at:
            self._alarm.notify()

    def _messages(self, number: int) -> Iterator[pb.StreamStepsRequest]:
        """What is sent on a stream; run by a thread of gRPC's, which asks for the next once one is on its way."""
        while (message := self._next_message(number)) is not None:
            yield message

    def _next_message(self, number: int) -> pb.StreamStepsRequest | None:
        with self._lock:
            while number == self._pipeline.stream:
                message = self._pipeline.take(number)
                if message is not None:
                    return message
                self._to_send.wait()
        return None

    def _read(self, number: int) -> None:
        """Opens a stream and reads it to its end."""
        error = None
        try:
            metadata = self._options.metadata()
            for message in self._stream_steps(self._messages(number), metadata=metadata):
                self._turn(self._pipeline.received, message, number)
        except grpc.RpcError as broken:
            error = errors.from_call(broken)
        except ValueError:  # gRPC's way to say that the channel is closed
            error = errors.closed("the client is closed")
        self._turn(self._pipeline.stream_ended, number, error)

    def _take_large(self) -> list[pb.StepRequest]:
        large = []
        while (request := self._pipeline.take_large()) is not None:
            large.append(request)
        return large

    def _send_alone(self, request: pb.StepRequest) -> None:
        timeout = request.timeout.seconds + request.timeout.nanos / 1e9
        try:
            call = self._step.future(request, timeout=timeout, metadata=self._options.metadata(request.traceparent))
        except (GatewayError, ValueError) as error:
            failure = error if isinstance(error, GatewayError) else errors.closed("the client is closed")
            self._turn(self._pipeline.refused, request.request_id, failure)
        else:
            call.add_done_callback(lambda done: self._answered_alone(request.request_id, done))

    def _answered_alone(self, request_id: str, call: "grpc.Future[pb.StepResponse]") -> None:
        try:
            response = call.result()
        except grpc.RpcError as error:
            failure = errors.from_call(error)
        except grpc.FutureCancelledError:
            failure = errors.closed("the client is closed")
        else:
            self._turn(self._pipeline.answered, response)
            return
        self._turn(self._pipeline.refused, request_id, failure)

    def _keep_time(self) -> None:
        while not self._closed:
            with self._lock:
                self._alarm_at = self._pipeline.wake_at()
                delay = self._alarm_at - time.monotonic()
                if delay > 0 and not self._closed:
                    self._alarm.wait(min(delay, threading.TIMEOUT_MAX))
            self._turn(self._pipeline.tick)
