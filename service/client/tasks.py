"""Drives a ``Pipeline`` with asyncio tasks, for the asyncio client. All of it runs on one event loop."""

import asyncio
import contextlib
import math
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

import grpc

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import calls, errors
from service.client.blocks import Block
from service.client.options import ClientOptions
from service.client.pipeline import Pipeline
from service.client.steps import Line, Step

_Stream: TypeAlias = "grpc.aio.StreamStreamCall[Any, pb.StreamStepsResponse]"


class StepTasks:
    """Sends steps over one stream of an asyncio channel at a time.

    Args:
        channel: Where to.
        options: How.
    """

    def __init__(self, channel: grpc.aio.Channel, options: ClientOptions) -> None:
        self._options = options
        self._tracing = options.tracing()
        self._loop = asyncio.get_running_loop()
        self._pipeline = Pipeline(
            policy=options.retry, max_message_bytes=options.max_message_bytes, clock=self._loop.time
        )
        self._sending_on = 0
        self._idle: asyncio.Future[None] | None = None  # of the sender, while it has nothing to send
        self._alarm: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        # grpc's published types take the serializer of the base class for the request's type.
        self._stream_steps: Callable[..., _Stream] = channel.stream_stream(
            calls.STREAM_STEPS, pb.StreamStepsRequest.SerializeToString, pb.StreamStepsResponse.FromString
        )
        self._step = channel.unary_unary(calls.STEP, pb.StepRequest.SerializeToString, pb.StepResponse.FromString)

    def submit(self, step: Step | Block) -> None:
        """Takes a step on, or a block of them. All that come before the event loop gets its turn share a message."""
        if self._tracing is not None:
            self._tracing.begin(step)
        self._pipeline.submit(step)
        self._wake()

    def cancel(self, step: Step | Block) -> None:
        """Gives a step up, or a block of them, as far as there is no outcome yet."""
        self._pipeline.cancel(step)
        self._wake()

    def close_line(self, line: Line, reason: str) -> None:
        """Takes no more steps of a session."""
        self._pipeline.close_line(line, reason)
        self._wake()

    async def close(self, reason: str) -> None:
        """Fails what has no outcome yet, and ends the tasks."""
        self._pipeline.close(reason)
        self._wake()
        if self._alarm is not None:
            self._alarm.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _wake(self) -> None:
        """Does what the pipeline wants done now."""
        pipeline = self._pipeline
        if pipeline.wants_stream():
            self._spawn(self._run_stream(pipeline.open_stream()))
        if pipeline.has_message() or pipeline.stream != self._sending_on:
            self._sending_on = pipeline.stream
            if self._idle is not None and not self._idle.done():
                self._idle.set_result(None)
        while (request := pipeline.take_large()) is not None:
            self._spawn(self._send_alone(request))
        self._set_alarm(pipeline.wake_at())
        for step in pipeline.take_finished():
            if self._tracing is not None:
                self._tracing.end(step)
            step.done(step)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _set_alarm(self, at: float) -> None:
        if self._alarm is not None:
            if self._alarm.when() <= at and not self._alarm.cancelled():
                return
            self._alarm.cancel()
            self._alarm = None
        if not math.isinf(at):
            self._alarm = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._pipeline.tick()
        self._wake()

    async def _run_stream(self, number: int) -> None:
        """Opens a stream, sends on it while it is the present one, and reads it to its end."""
        error = None
        try:
            call = self._stream_steps(metadata=self._options.metadata())
            sender = self._loop.create_task(self._send(call, number))
            try:
                async for message in call:
                    self._pipeline.received(message, number)
                    self._wake()
            finally:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)
        except grpc.RpcError as broken:
            error = errors.from_call(broken)
        self._pipeline.stream_ended(number, error)
        self._wake()

    async def _send(self, call: _Stream, number: int) -> None:
        # Where writing fails the stream has ended; its reader hears why.
        with contextlib.suppress(grpc.RpcError, asyncio.InvalidStateError):
            while number == self._pipeline.stream:
                message = self._pipeline.take(number)
                if message is not None:
                    await call.write(message)
                else:
                    self._idle = self._loop.create_future()
                    await self._idle
            await call.done_writing()

    async def _send_alone(self, request: pb.StepRequest) -> None:
        timeout = request.timeout.seconds + request.timeout.nanos / 1e9
        try:
            response = await self._step(request, timeout=timeout, metadata=self._options.metadata(request.traceparent))
        except grpc.RpcError as broken:
            self._pipeline.refused(request.request_id, errors.from_call(broken))
        else:
            self._pipeline.answered(response)
        self._wake()
