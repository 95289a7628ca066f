"""The two services of the public API: parse, call the engine, render."""

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf import empty_pb2
from google.rpc import code_pb2

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import model_service_pb2_grpc, sequence_service_pb2_grpc
from ntm_serving.v1 import sequence_service_pb2 as pb
from service import codec
from service.alike import AlikeSteps, parse_columns, parse_requests
from service.answers import Answers
from service.arenas import Arena
from service.bounds import check_bounds
from service.catalog import not_served
from service.columns import Columns
from service.engine import Engine
from service.errors import ServiceError
from service.express import Came, Express, ExpressSteps
from service.forms import Form
from service.identity import Principal, current, current_connection
from service.logs import RequestLog
from service.lone import StreamMessages
from service.observing import Observer, reason_of
from service.seal import Sealer
from service.sessions.cohort import Replies
from service.single import SingleStep
from service.status import status_of
from service.step_stream import Answer, Arrived, Begun, StepStream, answer_of
from service.types import SessionKey, StepCall, StepCalls, StepReply

_log = logging.getLogger(__name__)

Context = grpc.aio.ServicerContext[Any, Any]
# Of the steps of one BatchStep, how many are under way at once: as many as a few batches take.
_BATCH_TASKS = 512
_RunStep = Callable[[pb.StepRequest, float | None], Awaitable[pb.StepResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for. Bytes and seconds.

    Attributes:
        max_chunk_bytes: The largest inputs of one step.
        max_stream_steps: Steps under way in one stream past which it is not read.
        step_timeout: Time limit of a step that has none.
        session_ttl: TTL of a session that asks for none.
        max_session_ttl: The longest TTL.
    """

    max_chunk_bytes: int
    max_stream_steps: int
    step_timeout: float
    session_ttl: float
    max_session_ttl: float


class SequenceServicer(sequence_service_pb2_grpc.SequenceServiceServicer):
    """``ntm_serving.v1.SequenceService``.

    Args:
        engine: What is called.
        limits: What a request may ask for.
        sealer: Seals snapshots and page tokens.
        observer: Hears of each step of a message that fails; of calls, the interceptor tells it.
        requests: Gets a line for each step of a message.
        span: Makes the span of a step, of the trace context that the step names; None where nothing is traced.
    """

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        sealer: Sealer,
        observer: Observer,
        requests: RequestLog,
        span: Callable[[str], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._engine = engine
        self._sessions = engine.sessions
        self._clock = engine.clock
        self._limits = limits
        self._sealer = sealer
        self._observer = observer
        self._requests = requests
        self._step = self._run if span is None else _within(span, self._run)
        # What has no task of its own has no trace context either.
        self._express = engine.express if span is None else None
        self._singles = engine.singles if span is None else None
        self._answers = Answers()

    async def CreateSession(self, request: pb.CreateSessionRequest, context: Context) -> pb.Session:
        name = codec.parse_id(request.model.name, "model.name")
        version = request.model.version if request.model.HasField("version") else None
        if not current().may_use(name):
            raise not_served(name)
        key, most = _key(request.session_id), current().max_sessions
        session = await self._sessions.create(key, name, version, self._ttl(request), owner_limit=most)
        return codec.render_session(session)

    async def GetSession(self, request: pb.GetSessionRequest, context: Context) -> pb.Session:
        return codec.render_session(await self._sessions.get(_key(request.session_id)))

    async def ListSessions(self, request: pb.ListSessionsRequest, context: Context) -> pb.ListSessionsResponse:
        principal, size = current().name, codec.parse_page_size(request.page_size)
        found = await self._sessions.list(principal, self._sealer.unseal_page(principal, request.page_token), size)
        more = self._sealer.seal_page(principal, found[-1].info.key.session_id) if len(found) == size else ""
        page = pb.ListSessionsResponse(next_page_token=more)
        for session in found:
            codec.render_session(session, page.sessions.add)
        return page

    async def DeleteSession(self, request: pb.DeleteSessionRequest, context: Context) -> empty_pb2.Empty:
        await self._sessions.delete(_key(request.session_id))
        return empty_pb2.Empty()

    async def ForkSession(self, request: pb.ForkSessionRequest, context: Context) -> pb.Session:
        source, caller, ttl = _key(request.session_id), current(), self._ttl(request)
        fork_id = codec.parse_id(request.fork_session_id, "fork_session_id")
        session = await self._sessions.fork(source, fork_id, ttl, caller.may_use, owner_limit=caller.max_sessions)
        return codec.render_session(session)

    async def SnapshotSession(self, request: pb.SnapshotSessionRequest, context: Context) -> pb.SnapshotSessionResponse:
        session, snapshot = await self._sessions.snapshot(_key(request.session_id))
        return pb.SnapshotSessionResponse(
            snapshot=self._sealer.seal_snapshot(snapshot), session=codec.render_session(session)
        )

    async def RestoreSession(self, request: pb.RestoreSessionRequest, context: Context) -> pb.Session:
        snapshot = self._sealer.unseal_snapshot(request.snapshot)
        key, caller, ttl = _key(request.session_id), current(), self._ttl(request)
        session = await self._sessions.restore(key, snapshot, ttl, caller.may_use, owner_limit=caller.max_sessions)
        return codec.render_session(session)

    async def InspectSession(self, request: pb.InspectSessionRequest, context: Context) -> pb.InspectSessionResponse:
        inspected = await self._sessions.inspect(_key(request.session_id))
        return pb.InspectSessionResponse(
            session=codec.render_session(inspected.session), state=codec.render_state(inspected.components)
        )

    async def Step(self, request: pb.StepRequest, context: Context) -> pb.StepResponse:
        remaining = context.time_remaining()
        response = await self._run_single(request, remaining)
        return await self._step(request, remaining) if response is None else response

    async def BatchStep(self, request: pb.BatchStepRequest, context: Context) -> pb.BatchStepResponse:
        responses = [pb.StepResponse()] * len(request.requests)
        left = iter(enumerate(request.requests))

        async def answer_in_turn() -> None:
            for place, step in left:
                responses[place] = await self._answer(step, context.time_remaining())

        # A message of thousands of steps must not become as many tasks at once: see `step_stream`.
        await asyncio.gather(*(answer_in_turn() for _ in range(min(len(responses), _BATCH_TASKS))))
        return pb.BatchStepResponse(responses=responses)

    def StreamSteps(
        self, request_iterator: AsyncIterator[pb.StreamStepsRequest], context: Context
    ) -> AsyncIterator[Any]:
        # Its messages are bytes: see `forms`.
        stream = StepStream(
            answer=self._answer,
            refuse=self._refuse,
            check=check_bounds,
            max_steps=self._limits.max_stream_steps,
            drained=self._engine.drained,
            begin=self._begin,
            begin_columns=self._begin_columns,
            begin_one=self._begin_single,
        )
        return stream.run(request_iterator)

    async def _run(self, request: pb.StepRequest, remaining: float | None) -> pb.StepResponse:
        """Runs one step within its own time limit and its call's, whichever ends first."""
        principal = current()
        call = self._parse(request, principal.name, remaining)
        return codec.render_reply(request, await self._engine.step(call, principal.max_queued_steps))

    async def _run_single(self, request: pb.StepRequest, remaining: float | None) -> pb.StepResponse | None:
        """The same without what a step needs that waits for its session; None where it has to go that way."""
        if self._singles is None:
            return None
        principal = current()
        call = self._parse(request, principal.name, remaining)
        reply = await self._singles.step(call, principal.max_queued_steps)
        return None if reply is None else codec.render_reply(request, reply)

    def _parse(self, request: pb.StepRequest, owner: str, remaining: float | None = None) -> StepCall:
        limit = codec.parse_timeout(request)
        if remaining is not None:
            limit = remaining if limit is None else min(limit, remaining)
        deadline = self._clock() + (self._limits.step_timeout if limit is None else limit)
        return codec.parse_step(request, owner, deadline, self._limits.max_chunk_bytes, current_connection() or owner)

    def _begin(self, requests: Sequence[pb.StepRequest], arrived: Arrived) -> Begun:
        """Begins steps of a stream without tasks, as far as that goes; whatever is wrong is told the other way."""
        if len(requests) == 1:
            begun = self._begin_single(requests[0], arrived)
            return ((), requests) if begun is None else ((begun,), ())
        way = self._express_way()
        if way is None:
            return (), requests
        return self._begin_alike(*way, *parse_requests(requests, self._limits.max_chunk_bytes), arrived)

    def _begin_single(self, request: pb.StepRequest, arrived: Arrived) -> SingleStep | None:
        """Likewise a step that came by itself."""
        if self._singles is None:
            return None
        try:
            principal = current()
            call = self._parse(request, principal.name)
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

    def _begin_columns(self, columns: Columns, arrived: Arrived) -> Begun:
        """Likewise those that came as columns."""
        way = self._express_way()
        if way is None:
            return (), columns.requests()
        return self._begin_alike(*way, *parse_columns(columns, self._limits.max_chunk_bytes), arrived)

    def _express_way(self) -> tuple[Express, Principal] | None:
        """What takes steps without tasks, and who asks; None where each step has to go by itself."""
        if self._express is None:
            return None
        try:
            return self._express, current()
        except ServiceError:
            return None

    def _begin_alike(
        self,
        express: Express,
        principal: Principal,
        alike: Sequence[AlikeSteps],
        others: Sequence[pb.StepRequest],
        arrived: Arrived,
    ) -> Begun:
        caller = current_connection() or principal.name
        now = self._clock()
        handles: list[ExpressSteps] = []
        left = list(others)
        for steps in alike:
            deadline = now + (self._limits.step_timeout if steps.limit is None else steps.limit)
            calls = StepCalls(
                *(principal.name, caller, deadline, steps.inputs),
                *(steps.session_ids, steps.positions, steps.digests, steps.names),
            )
            ended = functools.partial(self._ended, steps, arrived)
            begun, places = express.begin(calls, principal.max_queued_steps, ended)
            handles += begun
            left += [steps.request(place) for place in places]
        return handles, left

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
        return self._refuse(request, came, began)

    def _ttl(self, request: pb.CreateSessionRequest | pb.ForkSessionRequest | pb.RestoreSessionRequest) -> float:
        ttl = request.ttl if request.HasField("ttl") else None
        return codec.parse_ttl(ttl, self._limits.session_ttl, self._limits.max_session_ttl)

    async def _answer(self, request: pb.StepRequest, remaining: float | None = None) -> pb.StepResponse:
        """Runs one step among others: what goes wrong with it stands in its own response."""
        began = time.perf_counter()
        try:
            response = await self._step(request, remaining)
        except ServiceError as error:
            return self._refuse(request, error, began)
        except Exception as error:  # noqa: BLE001 - a bug met by one step must not end the stream of the others
            _log.exception("a step failed in a way that it should not")
            return self._refuse(request, error, began)
        if self._requests.wanted():
            self._note(request, "OK", "", began)
        return response

    def _refuse(self, request: pb.StepRequest, error: BaseException, began: float | None = None) -> pb.StepResponse:
        """The response of a step among others that failed, or was not even run."""
        self._observer.failed(error)
        response = codec.render_failure(request, status_of(error))
        if self._requests.wanted():
            self._note(request, code_pb2.Code.Name(response.status.code), reason_of(error), began)
        return response

    def _note(self, request: pb.StepRequest, code: str, reason: str, began: float | None) -> None:
        seconds = 0.0 if began is None else time.perf_counter() - began
        self._requests.write("step", code=code, seconds=seconds, session_id=request.session_id, reason=reason)


class ModelServicer(model_service_pb2_grpc.ModelServiceServicer):
    """``ntm_serving.v1.ModelService``."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    async def ListModels(self, request: model_pb.ListModelsRequest, context: Context) -> model_pb.ListModelsResponse:
        models = await self._engine.models()
        may_use = current().may_use
        return model_pb.ListModelsResponse(
            models=[codec.render_model(name, versions) for name, versions in models.items() if may_use(name)]
        )

    async def GetModel(self, request: model_pb.GetModelRequest, context: Context) -> model_pb.Model:
        name = codec.parse_id(request.name, "name")
        if not current().may_use(name):
            raise not_served(name)
        return codec.render_model(name, await self._engine.model(name))


def _within(span: Callable[[str], AbstractContextManager[None]], run: _RunStep) -> _RunStep:
    """``run`` with a span around each step."""

    async def step(request: pb.StepRequest, remaining: float | None) -> pb.StepResponse:
        with span(request.traceparent):
            return await run(request, remaining)

    return step


def forms(max_message_bytes: int) -> Mapping[str, Form]:
    """What messages of the most frequent methods are made of and made into, by the methods' full names."""
    service = pb.DESCRIPTOR.services_by_name["SequenceService"].full_name
    return {
        f"/{service}/Step": Form(Arena(pb.StepRequest).parse, pb.StepResponse.SerializeToString),
        f"/{service}/StreamSteps": Form(StreamMessages(max_message_bytes).parse, None),  # its responses are bytes
    }


def _key(session_id: str) -> SessionKey:
    return SessionKey(current().name, codec.parse_id(session_id, "session_id"))
