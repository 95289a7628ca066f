"""One stream of steps: messages come in with many steps, responses go out with many, as they finish."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import Draining, ServiceError

# A response message holds about this many bytes of outputs at the most, so that it passes a client that still has
# gRPC's default limit of 4 MiB. A single response may be larger.
_MESSAGE_BYTES = 2 * 1024 * 1024
# Past so many bytes of responses that the client has not taken, no more of its steps are read.
_UNTAKEN_BYTES = 16 * 1024 * 1024


class StepStream:
    """Runs the steps of one stream, each as a task of its own.

    Args:
        answer: Runs one step and returns its response; it raises only when its task is cancelled.
        refuse: The response of a step that is not run, or was cancelled: takes the request and the reason.
        check: Raises a ``ServiceError`` if a whole message cannot be taken; each of its steps is refused with it.
        max_steps: Steps that are under way or whose responses are not taken yet, past which no more is read: the client
            feels it as HTTP/2 flow control. One that does not read its responses is soon not read either.
        drained: Set once the gateway answers nothing more: the stream ends, and its client goes to another gateway.
    """

    def __init__(
        self,
        *,
        answer: Callable[[pb.StepRequest], Coroutine[Any, Any, pb.StepResponse]],
        refuse: Callable[[pb.StepRequest, BaseException], pb.StepResponse],
        check: Callable[[pb.StreamStepsRequest], None],
        max_steps: int,
        drained: asyncio.Event,
    ) -> None:
        self._answer = answer
        self._refuse = refuse
        self._check = check
        self._max_steps = max_steps
        self._drained = drained
        self._tasks: dict[asyncio.Task[pb.StepResponse], pb.StepRequest] = {}
        self._by_id: dict[str, asyncio.Task[pb.StepResponse]] = {}
        self._done: deque[pb.StepResponse] = deque()
        self._done_bytes = 0
        self._wake = asyncio.Event()
        self._room = asyncio.Event()
        self._room.set()

    async def run(self, messages: AsyncIterator[pb.StreamStepsRequest]) -> AsyncIterator[pb.StreamStepsResponse]:
        """Yields responses until the client has closed its side and every step is answered.

        Ends with the reader's error where reading failed. Whatever ends it, no step of it is left running.

        Raises:
            Draining: the gateway has drained; every step that it took is answered.
        """
        reader = asyncio.create_task(self._read(messages))
        draining = asyncio.create_task(self._drained.wait())
        reader.add_done_callback(lambda _: self._wake.set())
        draining.add_done_callback(lambda _: self._wake.set())
        try:
            while not (reader.done() or draining.done()) or self._tasks or self._done:
                await self._wake.wait()
                self._wake.clear()
                while self._done:
                    yield self._next_message()
            if not reader.done():
                raise Draining("this gateway is shutting down; another one will take the stream")
            await reader
        finally:
            reader.cancel()
            draining.cancel()
            for task in tuple(self._tasks):
                task.cancel()

    async def _read(self, messages: AsyncIterator[pb.StreamStepsRequest]) -> None:
        async for message in messages:
            try:
                self._check(message)
            except ServiceError as error:
                for request in message.requests:
                    await self._room.wait()
                    self._answered(self._refuse(request, error))
                continue
            for request in message.requests:
                await self._room.wait()
                self._start(request)
            for request_id in message.cancel:
                task = self._by_id.get(request_id)
                if task is not None:
                    task.cancel()

    def _start(self, request: pb.StepRequest) -> None:
        # Tasks start in the order in which they are made, which keeps the steps of one session in order.
        task = asyncio.create_task(self._answer(request))
        self._tasks[task] = request
        if request.request_id:
            self._by_id[request.request_id] = task
        task.add_done_callback(self._finish)
        self._look_for_room()

    def _finish(self, task: asyncio.Task[pb.StepResponse]) -> None:
        request = self._tasks.pop(task)
        if self._by_id.get(request.request_id) is task:
            del self._by_id[request.request_id]
        self._answered(self._refuse(request, asyncio.CancelledError()) if task.cancelled() else task.result())

    def _answered(self, response: pb.StepResponse) -> None:
        self._done.append(response)
        self._done_bytes += len(response.outputs.content)
        self._wake.set()
        self._look_for_room()

    def _look_for_room(self) -> None:
        if len(self._tasks) + len(self._done) < self._max_steps and self._done_bytes < _UNTAKEN_BYTES:
            self._room.set()
        else:
            self._room.clear()

    def _next_message(self) -> pb.StreamStepsResponse:
        """All the responses that are ready, or as many as make a message."""
        responses: list[pb.StepResponse] = []
        size = 0
        while self._done and (not responses or size + len(self._done[0].outputs.content) <= _MESSAGE_BYTES):
            size += len(self._done[0].outputs.content)
            responses.append(self._done.popleft())
        self._done_bytes -= size
        self._look_for_room()
        return pb.StreamStepsResponse(responses=responses)
