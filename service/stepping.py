"""How the steps of calls and of streams are run: each the shortest way that it can go, and what it came to rendered.

A step that has nothing to wait for but its batch needs no task (``Singles``, ``Express``); any other goes through
``Engine.step``, which alone tells what is wrong with it.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractContextManager

from google.rpc import code_pb2

from ntm_serving.v1 import sequence_service_pb2 as pb
from service import codec
from service.alike import AlikeSteps, parse_columns, parse_requests
from service.answers import Answers
from service.columns import Columns
from service.engine import Engine
from service.errors import ServiceError
from service.express import Came, Ended, Express, ExpressSteps
from service.identity import Principal, current, current_connection
from service.limits import Limits
from service.logs import RequestLog
from service.observing import Observer, reason_of
from service.ordered_steps import Told
from service.sessions.cohort import Replies
from service.single import SingleStep
from service.status import status_of
from service.step_stream import Answer, Arrived, Begun, answer_of
from service.types import StepCall, StepCalls, StepReply

_log = logging.getLogger(__name__)

_RunStep = Callable[[pb.StepRequest, float | None], Awaitable[pb.StepResponse]]


class Stepping:
    """Runs steps of the caller in whose context it is called.

    Args:
        engine: What is called.
        limits: What a request may ask for.
        observer: Hears of each step of a message that fails; of calls, the interceptor tells it.
        requests: Gets a line for each step of a message.
        span: Makes the span of a step, of the trace context that the step names; None where nothing is traced.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        observer: Observer,
        requests: RequestLog,
        span: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._engine = engine
        self._clock = engine.clock
        self._limits = limits
        self._observer = observer
        self._requests = requests
        self._step = self._run if span is None else _within(span, self._run)
        # What has no task of its own has no trace context either.
        self._express = engine.express if span is None else None
        self._singles = engine.singles if span is None else None
        self._answers = Answers()

    async def step(self, request: pb.StepRequest, remaining: float | None) -> pb.StepResponse:
        """Runs the step of a call that has so many seconds left.

        Raises:
            ServiceError: see the table of docs/api.md.
        """
        if self._singles is None:
            return await self._step(request, remaining)
        principal = current()
        call = self._parse(request, principal.name, remaining)
        reply = await self._singles.step(call, principal.max_queued_steps)
        if reply is None:  # the long way, in what is left of the same time limit
            reply = await self._engine.step(call, principal.max_queued_steps)
        return codec.render_reply(request, reply)

    async def _run(self, request: pb.StepRequest, remaining: float | None) -> pb.StepResponse:
        """Runs one step within its own time limit and its call's, whichever ends first."""
        principal = current()
        call = self._parse(request, principal.name, remaining)
        return codec.render_reply(request, await self._engine.step(call, principal.max_queued_steps))

    def _parse(
        self, request: pb.StepRequest, owner: str, remaining: float | None = None, *, check_id: bool = True
    ) -> StepCall:
        deadline = self._clock() + self._limit(codec.parse_timeout(request), remaining)
        caller, most = current_connection() or owner, self._limits.max_chunk_bytes
        return codec.parse_step(request, owner, deadline, most, caller, check_id=check_id)

    def _limit(self, limit: float | None, remaining: float | None) -> float:
        """The time limit of a step: its own or its call's, whichever ends first; the gateway's where it has none."""
        if remaining is None:
            return self._limits.step_timeout if limit is None else limit
        return remaining if limit is None else min(limit, remaining)

    def begin(self, requests: Sequence[pb.StepRequest], arrived: Arrived) -> Begun:
        """Begins steps of a stream without tasks, as far as that goes; whatever is wrong is told the other way."""
        if len(requests) == 1:
            begun = self.begin_single(requests[0], arrived)
            return ((), requests) if begun is None else ((begun,), ())
        way = self._express_way()
        if way is None:
            return (), requests
        return self._begin_alike(*way, *parse_requests(requests, self._limits.max_chunk_bytes), self._ended_of(arrived))

    def begin_single(self, request: pb.StepRequest, arrived: Arrived) -> SingleStep | None:
        """Likewise a step that came by itself."""
        if self._singles is None:
            return None
        try:
            principal = current()
            # An id that is none has no session: then the long way says what is wrong with it.
            call = self._parse(request, principal.name, check_id=False)
        except ServiceError:
            return None
        ended = functools.partial(self._single_ended, request, arrived)
        return self._singles.begin(call, request.request_id, principal.max_queued_steps, ended)

    def _single_ended(self, request: pb.StepRequest, arrived: Arrived, step: SingleStep, came: Came) -> None:
        """Renders what it came to."""
        if isinstance(came, StepReply):
            answer = Answer(self._answers.of(request.request_id, request.session_id, came), 1)
            if self._requests.wanted():
                self._note(request, "OK", "", step.began)
        elif came is None:
            arrived(step, (), (request,))
            return
        else:
            answer = answer_of(self._refusal(request, came, step.began))
        arrived(step, (answer,), ())

    def begin_columns(self, columns: Columns, arrived: Arrived) -> Begun:
        """Likewise those that came as columns."""
        way = self._express_way()
        if way is None:
            return (), columns.requests()
        return self._begin_alike(*way, *parse_columns(columns, self._limits.max_chunk_bytes), self._ended_of(arrived))

    def _express_way(self) -> tuple[Express, Principal] | None:
        """What takes steps without tasks, and who asks; None where each step has to go by itself."""
        if self._express is None:
            return None
        try:
            return self._express, current()
        except ServiceError:
            return None

    def begin_in_order(self, requests: Sequence[pb.StepRequest], told: Told, remaining: float | None) -> Begun:
        """Likewise steps of a call that has so many seconds left, and is answered in their order."""
        way = self._express_way()
        if way is None:
            return (), requests
        alike, others = parse_requests(requests, self._limits.max_chunk_bytes)

        def ended_of(steps: AlikeSteps) -> Ended:
            return functools.partial(self._ended_in_order, steps, told)

        return self._begin_alike(*way, alike, others, ended_of, remaining)

    def _begin_alike(
        self,
        express: Express,
        principal: Principal,
        alike: Sequence[AlikeSteps],
        others: Sequence[pb.StepRequest],
        ended_of: Callable[[AlikeSteps], Ended],
        remaining: float | None = None,
    ) -> Begun:
        caller = current_connection() or principal.name
        now = self._clock()
        handles: list[ExpressSteps] = []
        left = list(others)
        for steps in alike:
            deadline = now + self._limit(steps.limit, remaining)
            calls = StepCalls(
                *(principal.name, caller, deadline, steps.inputs),
                *(steps.session_ids, steps.positions, steps.digests, steps.names),
            )
            begun, places = express.begin(calls, principal.max_queued_steps, ended_of(steps))
            handles += begun
            left += [steps.request(place) for place in places]
        return handles, left

    def _ended_of(self, arrived: Arrived) -> Callable[[AlikeSteps], Ended]:
        return lambda steps: functools.partial(self._ended, steps, arrived)

    def _ended(
        self,
        alike: AlikeSteps,
        arrived: Arrived,
        steps: ExpressSteps,
        places: Sequence[int],
        came: Sequence[Came],
    ) -> None:
        """Renders what steps came to that had no tasks."""
        applied: Sequence[int]
        replies: Sequence[StepReply]
        refusals: list[pb.StepResponse] = []
        again: list[pb.StepRequest] = []
        if isinstance(came, Replies):
            applied, replies = places, came
        else:
            applied, replies = self._sort_out(alike, steps, places, came, refusals, again)
        answers = alike.render(self._answers, applied, replies)
        if refusals:
            # Each by itself: however many there are, the stream makes messages of a limited size of them.
            answers = [*map(answer_of, refusals), *answers]
        if self._requests.on:
            for place in applied:
                if self._requests.wanted():
                    self._note(alike.request(place), "OK", "", steps.began)
        arrived(steps, answers, again)

    def _ended_in_order(
        self, alike: AlikeSteps, told: Told, steps: ExpressSteps, places: Sequence[int], came: Sequence[Came]
    ) -> None:
        """Likewise, each by itself."""
        answers: list[tuple[pb.StepRequest, pb.StepResponse]] = []
        again: list[pb.StepRequest] = []
        for place, one in zip(places, came, strict=True):
            request = alike.request(place)
            if isinstance(one, StepReply):
                answers.append((request, codec.render_reply(request, one)))
                if self._requests.wanted():
                    self._note(request, "OK", "", steps.began)
            elif one is None:
                again.append(request)
            else:
                answers.append((request, self._refusal(request, one, steps.began)))
        told(steps, answers, again)

    def _sort_out(
        self,
        alike: AlikeSteps,
        steps: ExpressSteps,
        places: Sequence[int],
        came: Sequence[Came],
        refusals: list[pb.StepResponse],
        again: list[pb.StepRequest],
    ) -> tuple[Sequence[int], Sequence[StepReply]]:
        """Those that were applied, and their replies; of the others, refusals are written, and requests kept."""
        applied: list[int] = []
        replies: list[StepReply] = []
        for place, one in zip(places, came, strict=True):
            if isinstance(one, StepReply):
                applied.append(place)
                replies.append(one)
            elif one is None:
                again.append(alike.request(place))
            else:
                refusals.append(self._refusal(alike.request(place), one, steps.began))
        return applied, replies

    def _refusal(self, request: pb.StepRequest, came: BaseException, began: float) -> pb.StepResponse:
        """The response of a step without a task that failed."""
        if not isinstance(came, ServiceError | asyncio.CancelledError):
            _log.error("a step failed in a way that it should not", exc_info=came)
        return self.refuse(request, came, began)

    async def answer(self, request: pb.StepRequest, remaining: float | None = None) -> pb.StepResponse:
        """Runs one step among others: what goes wrong with it stands in its own response."""
        began = time.perf_counter()
        try:
            response = await self._step(request, remaining)
        except ServiceError as error:
            return self.refuse(request, error, began)
        except Exception as error:  # noqa: BLE001 - a bug met by one step must not end the stream of the others
            _log.exception("a step failed in a way that it should not")
            return self.refuse(request, error, began)
        if self._requests.wanted():
            self._note(request, "OK", "", began)
        return response

    def refuse(self, request: pb.StepRequest, error: BaseException, began: float | None = None) -> pb.StepResponse:
        """The response of a step among others that failed, or was not even run."""
        self._observer.failed(error)
        response = codec.render_failure(request, status_of(error))
        if self._requests.wanted():
            self._note(request, code_pb2.Code.Name(response.status.code), reason_of(error), began)
        return response

    def _note(self, request: pb.StepRequest, code: str, reason: str, began: float | None) -> None:
        seconds = 0.0 if began is None else time.perf_counter() - began
        self._requests.write("step", code=code, seconds=seconds, session_id=request.session_id, reason=reason)


def _within(span: Callable[[str], AbstractContextManager[None]], run: _RunStep) -> _RunStep:
    """``run`` with a span around each step."""

    async def step(request: pb.StepRequest, remaining: float | None) -> pb.StepResponse:
        with span(request.traceparent):
            return await run(request, remaining)

    return step
