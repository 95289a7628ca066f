"""The steps of one call, answered in the order in which they came."""

import asyncio
import contextvars
import functools
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeAlias

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.step_stream import Begun, Handle

# Steps of one call that are under way at once: as many as a few batches take, and not as many tasks as a message holds.
_MOST = 512

# Called with a handle, the responses of some of its steps, and the requests of those that need a task after all.
Told: TypeAlias = Callable[[Handle, Sequence[tuple[pb.StepRequest, pb.StepResponse]], Sequence[pb.StepRequest]], None]


class OrderedSteps:
    """Runs the steps of one call; those of a session one after the other.

    Args:
        requests: What was asked for.
        begin: Begins steps of different sessions without a task for each, as far as that goes; returns handles, and the
            requests that need a task. What becomes of the others is told later, never before it returns.
        answer: Runs one step and returns its response; it raises only when its task is cancelled.
        most: Steps that are under way at once.
    """

    def __init__(
        self,
        requests: Sequence[pb.StepRequest],
        *,
        begin: Callable[[Sequence[pb.StepRequest], Told], Begun],
        answer: Callable[[pb.StepRequest], Coroutine[Any, Any, pb.StepResponse]],
        most: int = _MOST,
    ) -> None:
        self._requests = list(requests)
        self._begin = begin
        self._answer = answer
        self._most = most
        # Each request is an object of its own, which stays as long as the list above.
        self._places = {id(request): place for place, request in enumerate(self._requests)}
        self._responses = [pb.StepResponse()] * len(self._requests)
        # Of this call: what steps came to is told out of others.
        self._context = contextvars.copy_context()
        self._under_way = 0
        self._busy: Counter[str] = Counter()  # sessions with steps under way
        self._handles: set[Handle] = set()
        self._tasks: set[asyncio.Task[pb.StepResponse]] = set()
        self._progress: asyncio.Future[None] | None = None

    async def run(self) -> Sequence[pb.StepResponse]:
        """Returns the responses once all are there. Where it is cancelled, so is what is under way."""
        begun, count = 0, len(self._requests)
        try:
            while begun < count or self._under_way:
                # By the half at a time: a few steps would make small batches.
                if begun < count and 2 * self._under_way <= self._most:
                    part = self._requests[begun : begun + self._most - self._under_way]
                    begun += len(part)
                    self._start(part)
                else:
                    self._progress = asyncio.get_running_loop().create_future()
                    await self._progress
        finally:
            for handle in tuple(self._handles):
                handle.cancel()
            for task in tuple(self._tasks):
                task.cancel()
        return self._responses

    def _start(self, requests: Sequence[pb.StepRequest]) -> None:
        first: list[pb.StepRequest] = []
        behind: list[pb.StepRequest] = []
        for request in requests:
            # A step must not overtake one of its session.
            (behind if request.session_id in self._busy else first).append(request)
            self._busy[request.session_id] += 1
        self._under_way += len(requests)
        if first:
            handles, others = self._begin(first, self._told)
            self._handles.update([handle for handle in handles if len(handle)])
            behind = [*others, *behind]
        for request in behind:
            self._start_task(request)

    def _told(
        self,
        handle: Handle,
        answers: Sequence[tuple[pb.StepRequest, pb.StepResponse]],
        others: Sequence[pb.StepRequest],
    ) -> None:
        """Some steps without tasks are through."""
        if not len(handle):
            self._handles.discard(handle)
        for request in others:
            self._start_task(request)
        for request, response in answers:
            self._answered(request, response)

    def _start_task(self, request: pb.StepRequest) -> None:
        # Tasks start in the order in which they are made, which keeps the steps of one session in order.
        task = asyncio.create_task(self._answer(request), context=self._context)
        self._tasks.add(task)
        task.add_done_callback(functools.partial(self._finish, request))

    def _finish(self, request: pb.StepRequest, task: asyncio.Task[pb.StepResponse]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():  # else nobody waits for it
            self._answered(request, task.result())

    def _answered(self, request: pb.StepRequest, response: pb.StepResponse) -> None:
        self._responses[self._places[id(request)]] = response
        self._under_way -= 1
        session_id = request.session_id
        self._busy[session_id] -= 1
        if not self._busy[session_id]:
            del self._busy[session_id]
        if self._progress is not None and not self._progress.done():
            self._progress.set_result(None)
