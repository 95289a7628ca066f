"""One stream of steps: messages come in with many steps, responses go out with many, as they finish."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Protocol, TypeAlias

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import Draining, ServiceError

# A response message holds about this many bytes of outputs at the most, so that it passes a client that still has
# gRPC's default limit of 4 MiB. A single response may be larger.
_MESSAGE_BYTES = 2 * 1024 * 1024
# Past so many bytes of responses that the client has not taken, no more of its steps are read.
_UNTAKEN_BYTES = 16 * 1024 * 1024


class Handle(Protocol):
    """A step under way."""

    def cancel(self) -> object:
        """Gives it up."""
        ...


Arrived: TypeAlias = Callable[[Handle, pb.StepResponse | None], None]
Begin: TypeAlias = Callable[[pb.StepRequest, Arrived], Handle | None]


class StepStream:
    """Runs the steps of one stream, each as a task of its own.

    Args:
        answer: Runs one step and returns its response; it raises only when its task is cancelled.
        refuse: The response of a step that is not run, or was cancelled: takes the request and the reason.
        check: Raises a ``ServiceError`` if a whole message cannot be taken; each of its steps is refused with it.
        max_steps: Steps that are under way or whose responses are not taken yet, past which no more is read: the client
            feels it as HTTP/2 flow control. One that does not read its responses is soon not read either.
        begin: Begins a step without a task, or returns None where it needs one. Takes the request and what to call with
            the step's handle and its response once it is through, or with None where it needs a task after all.
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
        begin: Begin = lambda request, arrived: None,
    ) -> None:
        self._answer = answer
        self._refuse = refuse
        self._check = check
        self._max_steps = max_steps
        self._drained = drained
        self._begin = begin
        self._under_way: dict[Handle, pb.StepRequest] = {}
        self._by_id: dict[str, Handle] = {}
        self._in_tasks: Counter[str] = Counter()  # sessions with steps that have tasks
        self._done: deque[tuple[pb.StepResponse, int]] = deque()  # with the bytes of their outputs
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
            while not (reader.done() or draining.done()) or self._under_way or self._done:
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
            for handle in tuple(self._under_way):
                handle.cancel()

    async def _read(self, messages: AsyncIterator[pb.StreamStepsRequest]) -> None:
        async for message in messages:
            try:
                self._check(message)
            except ServiceError as error:
                if not message.requests:
                    raise  # there is no step that could be refused by itself
                for request in message.requests:
                    await self._room.wait()
                    self._answered(self._refuse(request, error))
                continue
            for request in message.requests:
                if not self._room.is_set():
                    await self._room.wait()
                self._start(request)
            for request_id in message.cancel:
                handle = self._by_id.get(request_id)
                if handle is not None:
                    handle.cancel()

    def _start(self, request: pb.StepRequest) -> None:
        # A step must not overtake one of its session that waits in a task.
        handle = None if request.session_id in self._in_tasks else self._begin(request, self._arrived)
        if handle is None:
            self._start_task(request)
        else:
            self._took(handle, request)

    def _start_task(self, request: pb.StepRequest) -> None:
        # Tasks start in the order in which they are made, which keeps the steps of one session in order.
        task = asyncio.create_task(self._answer(request))
        self._in_tasks[request.session_id] += 1
        self._took(task, request)
        task.add_done_callback(self._finish)

    def _took(self, handle: Handle, request: pb.StepRequest) -> None:
        self._under_way[handle] = request
        if request.request_id:
            self._by_id[request.request_id] = handle
        if len(self._under_way) + len(self._done) >= self._max_steps:
            self._room.clear()

    def _finish(self, task: asyncio.Task[pb.StepResponse]) -> None:
        request = self._let_go(task)
        self._in_tasks[request.session_id] -= 1
        if not self._in_tasks[request.session_id]:
            del self._in_tasks[request.session_id]
        self._answered(self._refuse(request, asyncio.CancelledError()) if task.cancelled() else task.result())

    def _arrived(self, handle: Handle, response: pb.StepResponse | None) -> None:
        """A step without a task is through."""
        request = self._let_go(handle)
        if response is None:
            self._start_task(request)
        else:
            self._answered(response)

    def _let_go(self, handle: Handle) -> pb.StepRequest:
        request = self._under_way.pop(handle)
        if self._by_id.get(request.request_id) is handle:
            del self._by_id[request.request_id]
        return request

    def _answered(self, response: pb.StepResponse) -> None:
        size = len(response.outputs.content)
        self._done.append((response, size))
        self._done_bytes += size
        self._wake.set()
        if self._done_bytes >= _UNTAKEN_BYTES or len(self._under_way) + len(self._done) >= self._max_steps:
            self._room.clear()

    def _next_message(self) -> pb.StreamStepsResponse:
        """All the responses that are ready, or as many as make a message."""
        responses: list[pb.StepResponse] = []
        size = 0
        while self._done and (not responses or size + self._done[0][1] <= _MESSAGE_BYTES):
            response, its_size = self._done.popleft()
            size += its_size
            responses.append(response)
        self._done_bytes -= size
        if self._done_bytes < _UNTAKEN_BYTES and len(self._under_way) + len(self._done) < self._max_steps:
            self._room.set()
        return pb.StreamStepsResponse(responses=responses)
