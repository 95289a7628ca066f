"""The calls that are not steps: each as its method, its request and how its answer is read. They do no I/O.

All of them may be repeated: the client picks the ids, so a create, a fork or a restore whose answer was lost finds what
it made, and the rest read or delete.
"""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import values, wire

T = TypeVar("T")

_SEQUENCES = pb.DESCRIPTOR.services_by_name["SequenceService"]
_MODELS = model_pb.DESCRIPTOR.services_by_name["ModelService"]
STREAM_STEPS = f"/{_SEQUENCES.full_name}/StreamSteps"
STEP = f"/{_SEQUENCES.full_name}/Step"


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One unary call.

    Attributes:
        path: The method's full name, ``/package.Service/Method``.
        request: What is sent.
        response: The class of what comes back.
        read: Makes the caller's value of it.
    """

    path: str
    request: Message
    response: type[Message]
    read: Callable[[Any], T]


def new_session_id() -> str:
    """A session id that nobody can guess: 128 random bits, in 22 characters; none that a shell takes for an option."""
    while (session_id := secrets.token_urlsafe(16)).startswith("-"):
        pass
    return session_id


def create_session(
    model: str, version: int | None, ttl: float | None, session_id: str | None
) -> Call[values.SessionInfo]:
    """Opens a session."""
    request = pb.CreateSessionRequest(
        session_id=new_session_id() if session_id is None else session_id,
        model=pb.ModelSpec(name=model, version=version),
        ttl=wire.to_duration(ttl),
    )
    return _sequences("CreateSession", request, pb.Session, values.to_session_info)


def get_session(session_id: str) -> Call[values.SessionInfo]:
    """Asks where a session stands."""
    return _sequences("GetSession", pb.GetSessionRequest(session_id=session_id), pb.Session, values.to_session_info)


def list_sessions(page_size: int, page_token: str) -> Call[tuple[list[values.SessionInfo], str]]:
    """One page of the caller's sessions, and the token of the next (empty on the last)."""
    request = pb.ListSessionsRequest(page_size=page_size, page_token=page_token)
    return _sequences("ListSessions", request, pb.ListSessionsResponse, _read_page)


def delete_session(session_id: str) -> Call[None]:
    """Ends a session."""
    return _sequences("DeleteSession", pb.DeleteSessionRequest(session_id=session_id), Empty, lambda _: None)


def fork_session(session_id: str, fork_id: str | None, ttl: float | None) -> Call[values.SessionInfo]:
    """Makes a new session with the state and position of another."""
    request = pb.ForkSessionRequest(
        session_id=session_id,
        fork_session_id=new_session_id() if fork_id is None else fork_id,
        ttl=wire.to_duration(ttl),
    )
    return _sequences("ForkSession", request, pb.Session, values.to_session_info)


def snapshot_session(session_id: str) -> Call[bytes]:
    """Reads a session as an opaque blob."""
    request = pb.SnapshotSessionRequest(session_id=session_id)
    return _sequences("SnapshotSession", request, pb.SnapshotSessionResponse, lambda answer: bytes(answer.snapshot))


def restore_session(snapshot: bytes, session_id: str | None, ttl: float | None) -> Call[values.SessionInfo]:
    """Makes a new session from a blob."""
    request = pb.RestoreSessionRequest(
        session_id=new_session_id() if session_id is None else session_id,
        snapshot=snapshot,
        ttl=wire.to_duration(ttl),
    )
    return _sequences("RestoreSession", request, pb.Session, values.to_session_info)


def inspect_session(session_id: str) -> Call[dict[str, wire.FloatArray]]:
    """Reads a session's state by name."""
    return _sequences(
        "InspectSession", pb.InspectSessionRequest(session_id=session_id), pb.InspectSessionResponse, _read_state
    )


def list_models() -> Call[list[values.Model]]:
    """Reads what is served."""
    return Call(
        f"/{_MODELS.full_name}/ListModels",
        model_pb.ListModelsRequest(),
        model_pb.ListModelsResponse,
        lambda answer: [values.to_model(model) for model in answer.models],
    )


def get_model(name: str) -> Call[values.Model]:
    """Reads one model."""
    return Call(f"/{_MODELS.full_name}/GetModel", model_pb.GetModelRequest(name=name), model_pb.Model, values.to_model)


def _sequences(name: str, request: Message, response: type[Message], read: Callable[[Any], T]) -> Call[T]:
    return Call(f"/{_SEQUENCES.full_name}/{name}", request, response, read)


def _read_page(answer: pb.ListSessionsResponse) -> tuple[list[values.SessionInfo], str]:
    return [values.to_session_info(session) for session in answer.sessions], answer.next_page_token


def _read_state(answer: pb.InspectSessionResponse) -> dict[str, wire.FloatArray]:
    return {part.name: wire.to_array(part.value) for part in answer.state}
