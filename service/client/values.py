"""What the gateway tells about models and sessions, as plain values."""

from dataclasses import dataclass, field
from datetime import UTC, datetime

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class StateComponent:
    """A named part of a session's state, as ``session.inspect()`` returns it.

    Attributes:
        name: For example ``"memory"``.
        shape: Its shape.
        axes: What each axis counts, for example ``("slots", "width")``; may be empty.
    """

    name: str
    shape: tuple[int, ...]
    axes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """One version of a model.

    Attributes:
        version: Its number; the highest is the newest.
        state: ``"AVAILABLE"``, ``"LOADING"``, ``"DRAINING"``, ``"FAILED"`` or ``"UNAVAILABLE"``. What follows
            ``state_message``, but for ``session_count``, is empty in a version that cannot be stepped.
        state_message: Why it is in that state, where there is something to say.
        fingerprint: SHA-256 over config, state layout and weights, in hexadecimal.
        input_dim: Features of one time step of inputs.
        output_dim: Features of one time step of outputs.
        state_size: Floats in one session's state.
        state_layout: What the state is made of.
        task: What it was trained on; may be empty.
        session_count: Live sessions that this gateway knows on it.
        keras_config_json: The Keras config that rebuilds the model.
    """

    version: int
    state: str
    state_message: str
    fingerprint: str
    input_dim: int
    output_dim: int
    state_size: int
    state_layout: tuple[StateComponent, ...]
    task: str
    session_count: int
    keras_config_json: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Model:
    """A model and its versions, newest first."""

    name: str
    versions: tuple[ModelVersion, ...]


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """Where a session stands, as of its last commit.

    Attributes:
        session_id: Its id.
        model: The model that it was opened with.
        version: The version that it stays on.
        fingerprint: That version's fingerprint.
        position: Time steps consumed.
        created: When it was opened.
        last_used: When it was last stepped.
        expires: When it ends unless it is stepped before.
    """

    session_id: str
    model: str
    version: int
    fingerprint: str
    position: int
    created: datetime
    last_used: datetime
    expires: datetime


def to_model(message: model_pb.Model) -> Model:
    """A model from its message."""
    return Model(message.name, tuple(_to_version(version) for version in message.versions))


def to_session_info(message: pb.Session) -> SessionInfo:
    """A session's public face from its message."""
    return SessionInfo(
        session_id=message.session_id,
        model=message.model.name,
        version=message.model.version,
        fingerprint=message.fingerprint,
        position=message.position,
        created=message.create_time.ToDatetime(UTC),
        last_used=message.last_use_time.ToDatetime(UTC),
        expires=message.expire_time.ToDatetime(UTC),
    )


def _to_version(message: model_pb.ModelVersion) -> ModelVersion:
    return ModelVersion(
        version=message.version,
        state=_state_name(message.state),
        state_message=message.state_message,
        fingerprint=message.fingerprint,
        input_dim=message.input_dim,
        output_dim=message.output_dim,
        state_size=message.state_size,
        state_layout=tuple(
            StateComponent(part.name, tuple(part.shape), tuple(part.axes)) for part in message.state_layout
        ),
        task=message.task,
        session_count=message.session_count,
        keras_config_json=message.keras_config_json,
    )


def _state_name(state: int) -> str:
    # A state that a newer gateway knows and this client does not is told by its number.
    names = model_pb.ModelVersion.State.DESCRIPTOR.values_by_number
    return names[state].name.removeprefix("STATE_") if state in names else str(state)
