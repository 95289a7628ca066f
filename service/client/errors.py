"""What can go wrong, as the caller sees it: ``grpc.RpcError``s with the rich error parsed."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
# After these a step may have been applied or not. Sending it again, with the same position, is safe and finds out.
_OUTCOME_UNKNOWN = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)


class FieldViolation(NamedTuple):
    """What is wrong with one field of a request (``google.rpc.BadRequest``)."""

    field: str
    description: str


class GatewayError(grpc.RpcError):
    """A call or a step failed. ``str()`` of it says how; programs branch on ``code()`` and ``reason``.

    Attributes:
        reason: The ``ErrorInfo.reason`` of docs/api.md, for example ``"SESSION_NOT_FOUND"``; empty where the gateway
            sent none, as when it could not be reached.
        metadata: ``ErrorInfo.metadata``: facts that a program can use.
        retry_after: Seconds after which the gateway thinks a retry makes sense (``RetryInfo``); None where it makes
            none.
        field_violations: The fields that are wrong (``BadRequest``).
    """

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        reason: str = "",
        metadata: Mapping[str, str] | None = None,
        retry_after: float | None = None,
        field_violations: Sequence[FieldViolation] = (),
        trailing_metadata: Sequence[tuple[str, str | bytes]] = (),
    ) -> None:
        super().__init__(f"{code.name}{f' [{reason}]' if reason else ''}: {message}")
        self._code = code
        self._message = message
        self._trailing_metadata = tuple(trailing_metadata)
        self.reason = reason
        self.metadata: Mapping[str, str] = dict(metadata or {})
        self.retry_after = retry_after
        self.field_violations = tuple(field_violations)

    def code(self) -> grpc.StatusCode:
        """The gRPC status code."""
        return self._code

    def details(self) -> str:
        """One sentence: what was expected and what came."""
        return self._message

    # grpc's published types call the pairs by a name of their own; they are the plain pairs of all other metadata.
    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:  # type: ignore[override] # see above
        """The call's trailing metadata; empty for a step that failed among others in a stream."""
        return self._trailing_metadata

    @property
    def outcome_unknown(self) -> bool:
        """Whether a step that failed so may still have been applied: step the same inputs again to find out."""
        return self._code in _OUTCOME_UNKNOWN

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (
            type(self),
            self._code,
            self._message,
            {
                "reason": self.reason,
                "metadata": self.metadata,
                "retry_after": self.retry_after,
                "field_violations": self.field_violations,
                "trailing_metadata": self._trailing_metadata,
            },
        )


class PositionMismatch(GatewayError):
    """The step begins neither where the session stands nor where its last step began.

    Somebody else stepped the session, or the store lost writes. The client never takes the session's position over by
    itself; ``client.attach(session_id, position=error.position)`` does so knowingly.
    """

    @property
    def position(self) -> int:
        """Where the session really stands, in time steps."""
        return int(self.metadata["position"])

    @property
    def last_begin(self) -> int | None:
        """Where its last step began; None where it has none."""
        value = self.metadata.get("last_begin", "")
        return int(value) if value else None


class StepConflict(PositionMismatch):
    """Other inputs were applied at the step's position already: an earlier step whose outcome was unknown, perhaps."""


class SessionNotFound(GatewayError):
    """Never opened, deleted or expired; or another principal's, which a caller cannot tell apart."""


class ModelNotFound(GatewayError):
    """No such model, or no such version of it."""


class PrecedingStepFailed(GatewayError):
    """The step was not sent, because the one before it in its session failed (which is its ``__cause__``)."""


_CLASS_OF: dict[str, type[GatewayError]] = {
    "POSITION_MISMATCH": PositionMismatch,
    "STEP_CONFLICT": StepConflict,
    "SESSION_NOT_FOUND": SessionNotFound,
    "MODEL_NOT_FOUND": ModelNotFound,
}


def from_status(status: status_pb2.Status, trailing_metadata: Sequence[tuple[str, str | bytes]] = ()) -> GatewayError:
    """The error that a ``google.rpc.Status`` stands for. Details of other kinds than ours are left out."""
    info = error_details_pb2.ErrorInfo()
    retry = error_details_pb2.RetryInfo()
    bad = error_details_pb2.BadRequest()
    retry_after = None
    for detail in status.details:
        if detail.Is(retry.DESCRIPTOR):
            detail.Unpack(retry)
            retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
        elif not detail.Unpack(info):
            detail.Unpack(bad)
    return _CLASS_OF.get(info.reason, GatewayError)(
        _CODES.get(status.code, grpc.StatusCode.UNKNOWN),
        status.message,
        reason=info.reason,
        metadata=info.metadata,
        retry_after=retry_after,
        field_violations=[FieldViolation(v.field, v.description) for v in bad.field_violations],
        trailing_metadata=trailing_metadata,
    )


def from_call(error: grpc.RpcError) -> GatewayError:
    """The error that a failed gRPC call stands for, its ``grpc-status-details-bin`` parsed.

    What a server or a proxy sent there and is not a ``google.rpc.Status`` is ignored: code and text are enough.
    """
    if isinstance(error, GatewayError):
        return error
    # The published types do not say so, but these are pairs (and None where there never was a server).
    pairs: Any = error.trailing_metadata() or ()
    trailing = tuple((str(key), value) for key, value in pairs)
    for key, value in trailing:
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return from_status(status_pb2.Status.FromString(value), trailing)
            except DecodeError:
                break
    return GatewayError(error.code(), error.details() or "", trailing_metadata=trailing)


def closed(reason: str) -> GatewayError:
    """What becomes of the steps of a session or a client that is closed."""
    return GatewayError(grpc.StatusCode.CANCELLED, reason, reason="CLOSED")


def expired(broken: GatewayError | None) -> GatewayError:
    """What becomes of a step whose time limit passed; ``broken`` is how the stream ended, where it is not back."""
    why = f"; the stream to the gateway broke meanwhile: {broken.details()}" if broken else ""
    error = GatewayError(
        grpc.StatusCode.DEADLINE_EXCEEDED,
        "the step's time limit passed; whether it was applied shows when it is sent again" + why,
        reason="DEADLINE_EXCEEDED",
    )
    error.__cause__ = broken
    return error


def nonsense(why: ValueError) -> GatewayError:
    """What becomes of a step whose answer cannot be its."""
    return GatewayError(grpc.StatusCode.INTERNAL, f"the gateway's answer makes no sense: {why}")


def _rebuild(kind: type[GatewayError], code: grpc.StatusCode, message: str, rest: Mapping[str, Any]) -> GatewayError:
    return kind(code, message, **rest)
