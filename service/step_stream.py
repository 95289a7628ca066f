"""One stream of steps: messages come in with many steps, responses go out with many, as they finish."""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import Draining, ServiceError

# A response message holds about this many bytes at the most, so that it passes a client that still has gRPC's default
# limit of 4 MiB. A single response may be larger.
_MESSAGE_BYTES = 2 * 1024 * 1024
# Past so many bytes of responses that the client has not taken, no more of its steps are read.
_UNTAKEN_BYTES = 16 * 1024 * 1024


class Handle(Protocol):
    """Steps under way without tasks."""

    def __len__(self) -> int:
        """How many are not through."""
        ...

    def names(self) -> Iterable[str]:
        """The request ids of those that are not through."""
        ...

    def cancel(self, request_id: str | None = None, /) -> object:
        """Gives up the one of this id; all of them where there is none."""
        ...


# Called with a handle, the responses of some of its steps, and the requests of those that need a task after all.
Arrived: TypeAlias = Callable[[Handle, pb.StreamStepsResponse, Sequence[pb.StepRequest]], None]
# Begins what it can without tasks; returns handles, and the requests that need a task.
Begin: TypeAlias = Callable[[Sequence[pb.StepRequest], Arrived], tuple[Sequence[Handle], Sequence[pb.StepRequest]]]


def _begin_nothing(
    requests: Sequence[pb.StepRequest], arrived: Arrived
) -> tuple[Sequence[Handle], Sequence[pb.StepRequest]]:
    return (), requests


class StepStream:
    """Runs the steps of one stream.

    Args:
        answer: Runs one step and returns its response; it raises only when its task is cancelled.
        refuse: The response of a step that is not run, or was cancelled: takes the request and the reason.
        check: Raises a ``ServiceError`` if a whole message cannot be taken; each of its steps is refused with it.
        max_steps: Steps that are under way or whose responses are not taken yet, past which no more is read: the client
            feels it as HTTP/2 flow control. One that does not read its responses is soon not read either.
        begin: Begins steps without a task for each, as far as that goes; takes requests of different sessions.
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
        begin: Begin = _begin_nothing,
    ) -> None:
        self._answer = answer
        self._refuse = refuse
        self._check = check
        self._max_steps = max_steps
        self._drained = drained
        self._begin = begin
        self._steps = 0  # under way, or answered and not taken
        self._handles: set[Handle] = set()
        self._tasks: dict[asyncio.Task[pb.StepResponse], pb.StepRequest] = {}
        self._by_id: dict[str, asyncio.Task[pb.StepResponse]] = {}
        self._in_tasks: Counter[str] = Counter()  # sessions with steps that have tasks
        self._done: deque[tuple[pb.StreamStepsResponse, int]] = deque()  # with their bytes
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
            while not (reader.done() or draining.done()) or self._handles or self._tasks or self._done:
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
            for handle in tuple(self._handles):
                handle.cancel()
            for task in tuple(self._tasks):
                task.cancel()

    async def _read(self, messages: AsyncIterator[pb.StreamStepsRequest]) -> None:
        async for message in messages:
            refused: ServiceError | None = None
            try:
                self._check(message)
            except ServiceError as error:
                if not message.requests:
                    raise  # there is no step that could be refused by itself
                refused = error
            requests, at = list(message.requests), 0
            while at < len(requests):
                if not self._room.is_set():
                    await self._room.wait()
                end = at + max(1, self._max_steps - self._steps)
                self._take(requests[at:end], refused)
                at = end
            if message.cancel and not refused:
                self._cancel(message.cancel)

    def _take(self, requests: Sequence[pb.StepRequest], refused: ServiceError | None) -> None:
        self._steps += len(requests)
        self._mind_room()
        if refused is None:
            for part in _of_different_sessions(requests):
                self._start(part)
            return
        for request in requests:
            self._answered(pb.StreamStepsResponse(responses=[self._refuse(request, refused)]))

    def _start(self, requests: Sequence[pb.StepRequest]) -> None:
        behind: list[pb.StepRequest] = []
        if self._in_tasks:
            # A step must not overtake one of its session that waits in a task.
            behind = [request for request in requests if request.session_id in self._in_tasks]
            requests = [request for request in requests if request.session_id not in self._in_tasks]
        handles, others = self._begin(requests, self._arrived) if requests else ((), ())
        self._handles.update(handles)
        for request in (*others, *behind):
            self._start_task(request)

    def _start_task(self, request: pb.StepRequest) -> None:
        # Tasks start in the order in which they are made, which keeps the steps of one session in order.
        task = asyncio.create_task(self._answer(request))
        self._in_tasks[request.session_id] += 1
        self._tasks[task] = request
        if request.request_id:
            self._by_id[request.request_id] = task
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[pb.StepResponse]) -> None:
        request = self._tasks.pop(task)
        if self._by_id.get(request.request_id) is task:
            del self._by_id[request.request_id]
        self._in_tasks[request.session_id] -= 1
        if not self._in_tasks[request.session_id]:
            del self._in_tasks[request.session_id]
        response = self._refuse(request, asyncio.CancelledError()) if task.cancelled() else task.result()
        self._answered(pb.StreamStepsResponse(responses=[response]))

    def _arrived(self, handle: Handle, responses: pb.StreamStepsResponse, others: Sequence[pb.StepRequest]) -> None:
        """Some steps without tasks are through."""
        if not len(handle):
            self._handles.discard(handle)
        for request in others:
            self._start_task(request)
        if responses.responses:
            self._answered(responses)

    def _cancel(self, request_ids: Iterable[str]) -> None:
        handles = {name: handle for handle in self._handles for name in handle.names()}
        for request_id in request_ids:
            task, handle = self._by_id.get(request_id), handles.get(request_id)
            if task is not None:
                task.cancel()
            elif handle is not None:
                handle.cancel(request_id)

    def _answered(self, responses: pb.StreamStepsResponse) -> None:
        size = responses.ByteSize()
        self._done.append((responses, size))
        self._done_bytes += size
        self._wake.set()
        self._mind_room()

    def _next_message(self) -> pb.StreamStepsResponse:
        """All the responses that are ready, or as many as make a message."""
        message, size = self._done.popleft()
        if size > _MESSAGE_BYTES and len(message.responses) > 1:
            self._done.extendleft(reversed(_halves(message)))
            return self._next_message()
        self._done_bytes -= size
        while self._done and size + self._done[0][1] <= _MESSAGE_BYTES:
            more, its_size = self._done.popleft()
            self._done_bytes -= its_size
            size += its_size
            message.MergeFrom(more)
        self._steps -= len(message.responses)
        self._mind_room()
        return message

    def _mind_room(self) -> None:
        if self._done_bytes >= _UNTAKEN_BYTES or self._steps >= self._max_steps:
            self._room.clear()
        else:
            self._room.set()


def _of_different_sessions(requests: Sequence[pb.StepRequest]) -> Iterator[Sequence[pb.StepRequest]]:
    """Cuts steps up, in their order, so that in no part there are two of one session."""
    if len({request.session_id for request in requests}) == len(requests):
        yield requests
        return
    begin, seen = 0, set[str]()
    for at, request in enumerate(requests):
        if request.session_id in seen:
            yield requests[begin:at]
            begin = at
            seen.clear()
        seen.add(request.session_id)
    yield requests[begin:]


def _halves(message: pb.StreamStepsResponse) -> list[tuple[pb.StreamStepsResponse, int]]:
    responses = message.responses
    middle = len(responses) // 2
    halves = [pb.StreamStepsResponse(responses=part) for part in (responses[:middle], responses[middle:])]
    return [(half, half.ByteSize()) for half in halves]
