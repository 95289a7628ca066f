"""One stream of steps: messages come in with many steps, responses go out with many, as they finish."""

import asyncio
import contextvars
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.bounds import MAX_MESSAGE_STEPS
from service.columns import Columns, check_count
from service.errors import Draining, ServiceError

# Says in a message that steps may come as columns.
_TAKES_COLUMNS = pb.StreamStepsResponse(takes_columns=True).SerializeToString()
# A response message holds about this many bytes at the most, so that it passes a client that still has gRPC's default
# limit of 4 MiB. A single response may be larger.
_MESSAGE_BYTES = 2 * 1024 * 1024
# Past so many bytes of responses that the client has not taken, no more of its steps are read.
_UNTAKEN_BYTES = 16 * 1024 * 1024
# A step that waits in a task takes some 4 KiB, forty times as much as its request. Behind so many of them the others
# wait as they came: further messages, and within one the steps of sessions that come up again.
_MAX_TASKS = 32


class Answer(NamedTuple):
    """The responses of some steps.

    Attributes:
        data: A ``StreamStepsResponse``, serialised. Such bytes one behind the other are a message as well, which says
            what each of them says (protobuf's encoding of repeated fields).
        steps: How many steps it answers.
    """

    data: bytes
    steps: int


def answer_of(*responses: pb.StepResponse) -> Answer:
    """What is told of steps one by one."""
    return Answer(pb.StreamStepsResponse(responses=responses).SerializeToString(), len(responses))


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


# Called with a handle, what some of its steps came to, and the requests of those that need a task after all.
Arrived: TypeAlias = Callable[[Handle, Sequence[Answer], Sequence[pb.StepRequest]], None]
# Begins what it can without tasks; returns handles, and the requests that need a task.
Begun: TypeAlias = tuple[Sequence[Handle], Sequence[pb.StepRequest]]
Begin: TypeAlias = Callable[[Sequence[pb.StepRequest], Arrived], Begun]
BeginColumns: TypeAlias = Callable[[Columns, Arrived], Begun]
# Likewise of one step; None where it needs a task.
BeginOne: TypeAlias = Callable[[pb.StepRequest, Arrived], Handle | None]
# What a stream is sent: of a message that is one step and nothing else, the step (see ``lone``).
Message: TypeAlias = pb.StreamStepsRequest | pb.StepRequest


def _begin_no_one(request: pb.StepRequest, arrived: Arrived) -> None:
    return None


def _begin_nothing(requests: Sequence[pb.StepRequest], arrived: Arrived) -> Begun:
    return (), requests


def _begin_no_columns(columns: Columns, arrived: Arrived) -> Begun:
    return (), columns.requests()


class StepStream:
    """Runs the steps of one stream.

    Args:
        answer: Runs one step and returns its response; it raises only when its task is cancelled.
        refuse: The response of a step that is not run, or was cancelled: takes the request and the reason.
        check: Raises a ``ServiceError`` if a whole message cannot be taken; each of its steps is refused with it. Not
            asked of a step that came by itself.
        max_steps: Steps that are under way or whose responses are not taken yet, past which no more is read: the client
            feels it as HTTP/2 flow control. One that does not read its responses is soon not read either.
        begin: Begins steps without a task for each, as far as that goes; takes requests of different sessions.
        begin_columns: The same of steps of different sessions that came as columns.
        begin_one: The same of a step by itself.
        max_message_steps: The most steps of a message; a stream that brings more in one ends.
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
        begin_columns: BeginColumns = _begin_no_columns,
        begin_one: BeginOne = _begin_no_one,
        max_message_steps: int = MAX_MESSAGE_STEPS,
    ) -> None:
        self._answer = answer
        self._refuse = refuse
        self._check = check
        self._max_message_steps = max_message_steps
        self._max_steps = max_steps
        self._drained = drained
        self._begin = begin
        self._begin_columns = begin_columns
        self._begin_one = begin_one
        # Of this stream's call. What a step came to is told out of others: its task must not run as somebody else's.
        self._context = contextvars.copy_context()
        self._told = False  # that steps may come as columns
        self._steps = 0  # under way, or answered and not taken
        self._handles: set[Handle] = set()
        self._tasks: dict[asyncio.Task[pb.StepResponse], pb.StepRequest] = {}
        self._by_id: dict[str, asyncio.Task[pb.StepResponse]] = {}
        self._fewer_tasks = asyncio.Event()
        self._in_tasks: Counter[str] = Counter()  # sessions with steps that have tasks
        self._done: deque[tuple[bytes | bytearray, int]] = deque()  # messages, and how many steps each answers
        self._done_bytes = 0
        self._idle: asyncio.Future[None] | None = None  # of ``run``, while it has nothing to do
        self._full = False  # as ``_room`` says
        self._room = asyncio.Event()
        self._room.set()

    async def run(self, messages: AsyncIterator[Message]) -> AsyncIterator[bytes]:
        """Yields responses until the client has closed its side and every step is answered.

        Each is a ``StreamStepsResponse``, serialised. Ends with the reader's error where reading failed. Whatever ends
        it, no step of it is left running.

        Raises:
            Draining: the gateway has drained; every step that it took is answered.
        """
        reader = asyncio.create_task(self._read(messages))
        draining = asyncio.create_task(self._drained.wait())
        reader.add_done_callback(lambda _: self._wake())
        draining.add_done_callback(lambda _: self._wake())
        loop = asyncio.get_running_loop()
        try:
            while not (reader.done() or draining.done()) or self._handles or self._tasks or self._done:
                if self._done:
                    yield self._next_message()
                else:
                    self._idle = loop.create_future()
                    await self._idle
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
            del reader  # which has the error that keeps this frame

    async def _read(self, messages: AsyncIterator[Message]) -> None:
        async for message in messages:
            if type(message) is pb.StepRequest:
                if self._full or len(self._tasks) >= _MAX_TASKS:
                    await self._take((message,), None)
                else:  # most messages: what is done for them need not be able to wait
                    self._count_in(1)
                    self._start_one(message)
                    if self._done:
                        await asyncio.sleep(0)  # what is answered goes out before the next message is asked for
                continue
            refused: ServiceError | None = None
            try:
                self._check(message)
            except ServiceError as error:
                if not (message.requests or message.columns):
                    raise  # there is no step that could be refused by itself
                refused = error
            await self._take_all(message, refused)

    def _wake(self) -> None:
        """Something has happened that ``run`` may wait for."""
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    async def _take_all(self, message: pb.StreamStepsRequest, refused: ServiceError | None) -> None:
        """Whatever is in a message."""
        check_count(message, self._max_message_steps)
        if requests := message.requests:
            await self._take(list(requests), refused)
        for columns in message.columns:
            await self._take_columns(Columns.of(columns), refused)
        if message.cancel and not refused:
            self._cancel(message.cancel)

    async def _take(self, requests: Sequence[pb.StepRequest], refused: ServiceError | None) -> None:
        at = 0
        while at < len(requests):
            if self._full:
                await self._room.wait()
            end = at + self._count_in(len(requests) - at)
            if refused is not None:
                self._refuse_all(requests[at:end], refused)
            else:
                await self._start_all(requests[at:end])
            at = end

    async def _take_columns(self, columns: Columns, refused: ServiceError | None) -> None:
        if refused is None:
            try:
                columns.check()
            except ServiceError as error:
                refused = error
        if refused is not None:
            await self._take(columns.names(), refused)
            return
        at, steps = 0, columns.steps
        while at < steps:
            if self._full:
                await self._room.wait()
            end = at + self._count_in(steps - at)
            await self._start_columns(columns if end - at == steps else columns.part(at, end))
            at = end

    def _count_in(self, steps: int) -> int:
        """Counts in as many of the steps as there is room for, one at the least; returns how many."""
        count = min(steps, max(1, self._max_steps - self._steps))
        self._steps += count
        if self._steps >= self._max_steps:
            self._mind_room()
        return count

    def _refuse_all(self, requests: Sequence[pb.StepRequest], refused: ServiceError) -> None:
        for request in requests:
            self._answered(answer_of(self._refuse(request, refused)))

    async def _start_all(self, requests: Sequence[pb.StepRequest]) -> None:
        for part in _of_different_sessions(requests):
            while len(self._tasks) >= _MAX_TASKS:
                self._fewer_tasks.clear()
                await self._fewer_tasks.wait()
            self._start(part)

    def _start_one(self, request: pb.StepRequest) -> None:
        if self._in_tasks and request.session_id in self._in_tasks:
            handle = None  # it must not overtake the one that waits in a task
        else:
            handle = self._begin_one(request, self._arrived)
        if handle is None:
            self._start_task(request)
        elif len(handle):  # else it is through already
            self._handles.add(handle)

    def _start(self, requests: Sequence[pb.StepRequest]) -> None:
        behind: list[pb.StepRequest] = []
        if self._in_tasks:
            # A step must not overtake one of its session that waits in a task.
            behind = [request for request in requests if request.session_id in self._in_tasks]
            requests = [request for request in requests if request.session_id not in self._in_tasks]
        if requests:
            self._note_begun(self._begin(requests, self._arrived))
        for request in behind:
            self._start_task(request)

    async def _start_columns(self, columns: Columns) -> None:
        sessions = set(columns.session_ids)
        if len(sessions) == len(columns.session_ids) and not (self._in_tasks and sessions & self._in_tasks.keys()):
            self._note_begun(self._begin_columns(columns, self._arrived))
            return
        await self._start_all(columns.requests())

    def _note_begun(self, begun: Begun) -> None:
        handles, others = begun
        self._handles.update([handle for handle in handles if len(handle)])
        for request in others:
            self._start_task(request)

    def _start_task(self, request: pb.StepRequest) -> None:
        # Tasks start in the order in which they are made, which keeps the steps of one session in order.
        task = asyncio.create_task(self._answer(request), context=self._context)
        self._in_tasks[request.session_id] += 1
        self._tasks[task] = request
        if request.request_id:
            self._by_id[request.request_id] = task
        task.add_done_callback(self._finish)

    def _finish(self, task: asyncio.Task[pb.StepResponse]) -> None:
        request = self._tasks.pop(task)
        self._fewer_tasks.set()
        if self._by_id.get(request.request_id) is task:
            del self._by_id[request.request_id]
        self._in_tasks[request.session_id] -= 1
        if not self._in_tasks[request.session_id]:
            del self._in_tasks[request.session_id]
        response = self._refuse(request, asyncio.CancelledError()) if task.cancelled() else task.result()
        self._answered(answer_of(response))

    def _arrived(self, handle: Handle, answers: Sequence[Answer], others: Sequence[pb.StepRequest]) -> None:
        """Some steps without tasks are through."""
        if not len(handle):
            self._handles.discard(handle)
        for request in others:
            self._start_task(request)
        for answer in answers:
            self._answered(answer)

    def _cancel(self, request_ids: Iterable[str]) -> None:
        handles = {name: handle for handle in self._handles for name in handle.names()}
        for request_id in request_ids:
            task, handle = self._by_id.get(request_id), handles.get(request_id)
            if task is not None:
                task.cancel()
            elif handle is not None:
                handle.cancel(request_id)

    def _answered(self, answer: Answer) -> None:
        """Has responses go out, in one message with those that wait: one each takes Python several times their size."""
        data: bytes | bytearray
        data, steps = answer
        self._done_bytes += len(data)
        if self._done and len(self._done[-1][0]) + len(data) <= _MESSAGE_BYTES:
            before, its_steps = self._done.pop()
            if isinstance(before, bytes):
                before = bytearray(before)
            before += data
            data, steps = before, its_steps + steps
        self._done.append((data, steps))
        self._wake()
        if self._done_bytes >= _UNTAKEN_BYTES:
            self._mind_room()

    def _next_message(self) -> bytes:
        """Responses that are ready, as many as make a message."""
        message, steps = self._done.popleft()
        self._done_bytes -= len(message)
        self._steps -= steps
        if self._full:
            self._mind_room()
        if not self._told:
            self._told = True
            return bytes(message) + _TAKES_COLUMNS
        return bytes(message)

    def _mind_room(self) -> None:
        full = self._done_bytes >= _UNTAKEN_BYTES or self._steps >= self._max_steps
        if full is not self._full:
            self._full = full
            if full:
                self._room.clear()
            else:
                self._room.set()


def _of_different_sessions(requests: Sequence[pb.StepRequest]) -> Iterator[Sequence[pb.StepRequest]]:
    """Cuts steps up, in their order, so that in no part there are two of one session."""
    if len(requests) == 1 or len({request.session_id for request in requests}) == len(requests):
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
