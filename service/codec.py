"""Protobuf to NumPy and back: the only conversion, and the check of everything a client may send."""

import functools
import re
from collections.abc import Callable, Sequence

import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import status_pb2

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.catalog import Listed
from service.digests import digest_of
from service.errors import InvalidArgument, InvalidId, InvalidTensor, MessageTooLarge
from service.sessions import Session, SessionSummary
from service.types import FloatArray, ModelVersion, SessionKey, StepCall, StepReply, VersionState, all_finite, tuple_of

_ID = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
LITTLE_FLOAT32 = np.dtype("<f4")
FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
_STATES = {state: model_pb.ModelVersion.State.Value(f"STATE_{state.name}") for state in VersionState}
MAX_REQUEST_ID = 64
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100


def parse_id(value: str, field: str) -> str:
    """A session id or a model name.

    Raises:
        InvalidId: it is not 1 to 64 of ``A-Z a-z 0-9 _ -``.
    """
    if not _ID.match(value):
        shown = value if len(value) <= 80 else value[:77] + "..."
        raise InvalidId(f"{field} is {shown!r}; expected 1 to 64 characters of A-Z a-z 0-9 _ -", field=field)
    return value


def parse_inputs(tensor: tensor_pb2.Tensor, max_bytes: int) -> tuple[FloatArray, bytes]:
    """A step's inputs ``[time, input_dim]`` and their digest. The array shares the message's bytes.

    Raises:
        MessageTooLarge: more than ``max_bytes`` of them.
        InvalidTensor: wrong dtype, rank, byte count, no time step, NaN or Inf; ``field`` says where.
    """
    content = tensor.content
    if len(content) > max_bytes:
        raise MessageTooLarge(
            f"inputs.content has {len(content)} bytes; at most {max_bytes} are taken in one chunk", limit=max_bytes
        )
    if tensor.dtype != FLOAT32:
        raise InvalidTensor(
            f"inputs.dtype is {_dtype_name(tensor.dtype)}; expected DATA_TYPE_FLOAT32", field="inputs.dtype"
        )
    sizes = tensor.shape
    if len(sizes) != 2:
        raise InvalidTensor(
            f"inputs.shape has {len(sizes)} dimensions; expected [time, input_dim]", field="inputs.shape"
        )
    shape = tuple(sizes)
    if shape[1] < 1:
        raise InvalidTensor(f"inputs.shape is {list(shape)}; expected [time, input_dim]", field="inputs.shape")
    if shape[0] < 1:
        raise InvalidTensor(
            f"inputs.shape is {list(shape)}: the chunk is empty; expected at least one time step", field="inputs.shape"
        )
    if len(content) != (expected := 4 * shape[0] * shape[1]):
        raise InvalidTensor(
            f"inputs.content has {len(content)} bytes; shape {list(shape)} of float32 takes {expected}",
            field="inputs.content",
        )
    array = np.ndarray(shape, LITTLE_FLOAT32, content)
    if not all_finite(array):
        step, column = np.argwhere(~np.isfinite(array))[0]
        raise InvalidTensor(
            f"inputs[{step}, {column}] is {array[step, column]}; expected finite", field="inputs.content"
        )
    return array, digest_of(content, *shape)


def parse_step(
    request: pb.StepRequest,
    principal: str,
    deadline: float,
    max_chunk_bytes: int,
    caller: str = "",
    *,
    check_id: bool = True,
) -> StepCall:
    """One step, checked as far as that goes without its model.

    Args:
        request: The step.
        principal: Whose session it is of.
        deadline: As of ``StepCall``, and so is ``caller``.
        max_chunk_bytes: The most bytes of inputs.
        caller: Who asks.
        check_id: Whether to check the session id. What is looked up and found nowhere needs no check before.

    Raises:
        InvalidId, InvalidArgument, InvalidTensor, MessageTooLarge: what is wrong with it.
    """
    if len(request.request_id) > MAX_REQUEST_ID:
        raise InvalidArgument(
            f"request_id has {len(request.request_id)} characters; at most {MAX_REQUEST_ID} are taken",
            field="request_id",
        )
    session_id = request.session_id
    if check_id:
        parse_id(session_id, "session_id")
    key = tuple_of(SessionKey, (principal, session_id))
    position = None
    if request.HasField("position"):
        position = request.position
        if position < 0:
            raise InvalidArgument(f"position is {position}; expected 0 or more", field="position")
    inputs, digest = parse_inputs(request.inputs, max_chunk_bytes)
    return tuple_of(StepCall, (key, position, inputs, digest, deadline, caller))


def parse_timeout(request: pb.StepRequest) -> float | None:
    """A step's own time limit in seconds; None where it has none.

    Raises:
        InvalidArgument: it is not positive.
    """
    if not request.HasField("timeout"):
        return None
    seconds = _seconds(request.timeout)
    if seconds <= 0:
        raise InvalidArgument(f"timeout is {seconds} s; expected more than 0", field="timeout")
    return seconds


def parse_ttl(duration: Duration | None, default: float, maximum: float) -> float:
    """A session's TTL in seconds.

    Raises:
        InvalidArgument: it is not positive, or above the maximum.
    """
    if duration is None:
        return default
    seconds = _seconds(duration)
    if not 0 < seconds <= maximum:
        raise InvalidArgument(f"ttl is {seconds} s; expected more than 0 and at most {maximum} s", field="ttl")
    return seconds


def parse_page_size(value: int) -> int:
    """How many sessions a page holds.

    Raises:
        InvalidArgument: it is negative, or above the maximum.
    """
    if not 0 <= value <= MAX_PAGE_SIZE:
        raise InvalidArgument(
            f"page_size is {value}; expected 0 (the gateway's choice) to {MAX_PAGE_SIZE}", field="page_size"
        )
    return value or DEFAULT_PAGE_SIZE


def render_tensor(array: FloatArray) -> tensor_pb2.Tensor:
    """An array of any rank."""
    content = array.astype(LITTLE_FLOAT32, copy=False).tobytes()
    return tensor_pb2.Tensor(dtype=FLOAT32, shape=array.shape, content=content)


def render_reply(request: pb.StepRequest, reply: StepReply) -> pb.StepResponse:
    """The response of a step that was applied, now or before."""
    response = pb.StepResponse.FromString(_blank_response(reply.outputs.shape))
    response.request_id, response.session_id = request.request_id, request.session_id
    response.position = reply.position
    response.outputs.content = reply.outputs.astype(LITTLE_FLOAT32, copy=False).tobytes()
    return response


# A message that is parsed takes half the time of one that is made field by field, and fewer blocks (see ``arenas``).
@functools.lru_cache(maxsize=1024)
def _blank_response(shape: tuple[int, ...]) -> bytes:
    """The response of a step with outputs of this shape, without what differs from one to the next."""
    return pb.StepResponse(outputs=tensor_pb2.Tensor(dtype=FLOAT32, shape=shape)).SerializeToString()


def render_failure(request: pb.StepRequest, status: status_pb2.Status) -> pb.StepResponse:
    """The response of a step that failed among others."""
    return pb.StepResponse(request_id=request.request_id, session_id=request.session_id, status=status)


def render_session(session: Session | SessionSummary, make: Callable[..., pb.Session] = pb.Session) -> pb.Session:
    """A session's public face; ``make`` may add it to a list of them: a message by itself takes much more memory."""
    info = session.info
    return make(
        session_id=info.key.session_id,
        model=pb.ModelSpec(name=info.version.model, version=info.version.version),
        fingerprint=info.fingerprint,
        position=session.position,
        create_time=_timestamp(info.created),
        last_use_time=_timestamp(session.last_used),
        expire_time=_timestamp(session.expires),
    )


def render_state(components: dict[str, FloatArray]) -> list[pb.StateTensor]:
    """A session's state by name."""
    return [pb.StateTensor(name=name, value=render_tensor(value)) for name, value in components.items()]


def render_model(name: str, versions: Sequence[Listed]) -> model_pb.Model:
    """A model and its versions."""
    return model_pb.Model(name=name, versions=[_render_version(listed) for listed in versions])


def _render_version(listed: Listed) -> model_pb.ModelVersion:
    message = model_pb.ModelVersion() if listed.version is None else _render_description(listed.version)
    message.version = listed.key.version
    message.state = _STATES[listed.status.state]
    message.state_message = listed.status.message
    message.session_count = listed.sessions
    return message


def _render_description(version: ModelVersion) -> model_pb.ModelVersion:
    return model_pb.ModelVersion(
        fingerprint=version.fingerprint,
        input_dim=version.input_dim,
        output_dim=version.output_dim,
        state_size=version.state_size,
        state_layout=[
            model_pb.StateComponent(name=part.name, shape=part.shape, offset=part.offset, axes=part.axes)
            for part in version.state_layout
        ],
        keras_config_json=version.keras_config_json,
        task=version.task,
    )


def _seconds(duration: Duration) -> float:
    return float(duration.seconds + duration.nanos / 1e9)


def _timestamp(seconds: float) -> Timestamp:
    whole = int(seconds // 1)
    return Timestamp(seconds=whole, nanos=int((seconds - whole) * 1e9))


def _dtype_name(dtype: int) -> str:
    names = tensor_pb2.DataType.DESCRIPTOR.values_by_number
    return str(names[dtype].name) if dtype in names else f"{dtype}"
