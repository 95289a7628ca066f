"""The two services of the public API: parse, call the engine, render."""

from collections.abc import AsyncIterator, Mapping
from typing import Any

import grpc
from google.protobuf import empty_pb2

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import model_service_pb2_grpc, sequence_service_pb2_grpc
from ntm_serving.v1 import sequence_service_pb2 as pb
from service import codec
from service.arenas import Arena
from service.bounds import check_bounds
from service.catalog import not_served
from service.engine import Engine
from service.forms import Form
from service.identity import current
from service.limits import Limits
from service.lone import StreamMessages
from service.ordered_steps import OrderedSteps
from service.seal import Sealer
from service.step_stream import StepStream
from service.stepping import Stepping
from service.types import SessionKey

Context = grpc.aio.ServicerContext[Any, Any]


class SequenceServicer(sequence_service_pb2_grpc.SequenceServiceServicer):
    """``ntm_serving.v1.SequenceService``.

    Args:
        engine: What is called.
        stepping: Runs its steps.
        limits: What a request may ask for.
        sealer: Seals snapshots and page tokens.
    """

    def __init__(self, engine: Engine, stepping: Stepping, limits: Limits, sealer: Sealer) -> None:
        self._engine = engine
        self._sessions = engine.sessions
        self._stepping = stepping
        self._limits = limits
        self._sealer = sealer

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
        return await self._stepping.step(request, context.time_remaining())

    async def BatchStep(self, request: pb.BatchStepRequest, context: Context) -> pb.BatchStepResponse:
        stepping = self._stepping
        # What is left of the call when a step begins: some begin once others are through.
        steps = OrderedSteps(
            request.requests,
            begin=lambda requests, told: stepping.begin_in_order(requests, told, context.time_remaining()),
            answer=lambda step: stepping.answer(step, context.time_remaining()),
        )
        return pb.BatchStepResponse(responses=await steps.run())

    def StreamSteps(
        self, request_iterator: AsyncIterator[pb.StreamStepsRequest], context: Context
    ) -> AsyncIterator[Any]:
        # Its messages are bytes: see `forms`.
        stepping = self._stepping
        stream = StepStream(
            answer=stepping.answer,
            refuse=stepping.refuse,
            check=check_bounds,
            max_steps=self._limits.max_stream_steps,
            drained=self._engine.drained,
            begin=stepping.begin,
            begin_columns=stepping.begin_columns,
            begin_one=stepping.begin_single,
        )
        return stream.run(request_iterator)

    def _ttl(self, request: pb.CreateSessionRequest | pb.ForkSessionRequest | pb.RestoreSessionRequest) -> float:
        ttl = request.ttl if request.HasField("ttl") else None
        return codec.parse_ttl(ttl, self._limits.session_ttl, self._limits.max_session_ttl)


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


def forms(max_message_bytes: int) -> Mapping[str, Form]:
    """What messages of the most frequent methods are made of and made into, by the methods' full names."""
    service = pb.DESCRIPTOR.services_by_name["SequenceService"].full_name
    return {
        f"/{service}/Step": Form(Arena(pb.StepRequest).parse, pb.StepResponse.SerializeToString),
        f"/{service}/StreamSteps": Form(StreamMessages(max_message_bytes).parse, None),  # its responses are bytes
    }


def _key(session_id: str) -> SessionKey:
    return SessionKey(current().name, codec.parse_id(session_id, "session_id"))
