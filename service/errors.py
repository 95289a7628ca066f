"""What can go wrong, as the gateway's own exceptions.

They name what happened and carry the facts; which gRPC status each becomes stands in one table,
``status.STATUS_OF``. A reason is part of the public API: clients branch on it.
"""

from collections.abc import Mapping
from typing import ClassVar


class ServiceError(Exception):
    """Base of every error that the gateway makes itself.

    Attributes:
        reason: The ``ErrorInfo.reason`` of docs/api.md.
        message: One sentence: what was expected and what came.
        metadata: ``ErrorInfo.metadata``: facts a program can use.
        retry_after: Seconds after which a retry makes sense (``RetryInfo``), or None where it makes none.
        version: Name and version of the model that it happened on, where that is known: for the operator's metrics.
    """

    reason: ClassVar[str] = "INTERNAL"
    retry_after: ClassVar[float | None] = None

    def __init__(self, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.message = message
        self.version: tuple[str, int] | None = None
        self.metadata: Mapping[str, str] = {name: str(value) for name, value in metadata.items()}


class InvalidRequest(ServiceError):
    """A field of the request is wrong; ``field`` says which (``BadRequest``)."""

    def __init__(self, message: str, *, field: str, **metadata: object) -> None:
        super().__init__(message, **metadata)
        self.field = field


class InvalidTensor(InvalidRequest):
    """Wrong dtype, shape or byte count, NaN or Inf, or no time step."""

    reason = "INVALID_TENSOR"


class InvalidId(InvalidRequest):
    """A session id or a model name outside of ``[A-Za-z0-9_-]{1,64}``."""

    reason = "INVALID_ID"


class InvalidArgument(InvalidRequest):
    """Any other field: a negative position, a TTL above the maximum."""

    reason = "INVALID_ARGUMENT"


class SessionNotFound(ServiceError):
    """Unknown, expired or deleted; or another principal's, which the caller cannot tell apart."""

    reason = "SESSION_NOT_FOUND"


class ModelNotFound(ServiceError):
    """No such model, or no such version of it."""

    reason = "MODEL_NOT_FOUND"


class SessionExists(ServiceError):
    """The id is taken by a session that this create did not make."""

    reason = "SESSION_EXISTS"


class PositionMismatch(ServiceError):
    """The step begins neither where the session stands nor where its last step began."""

    reason = "POSITION_MISMATCH"


class StepConflict(ServiceError):
    """The step begins where the last one began, with other inputs."""

    reason = "STEP_CONFLICT"


class ModelVersionUnavailable(ServiceError):
    """The session's version, with its fingerprint, is served no more. The session is kept."""

    reason = "MODEL_VERSION_UNAVAILABLE"


class FingerprintMismatch(ServiceError):
    """A version of this number is served, but it is another model. The session is kept."""

    reason = "FINGERPRINT_MISMATCH"


class SessionLimit(ServiceError):
    """As many sessions as the gateway keeps."""

    reason = "SESSION_LIMIT"
    retry_after = 5.0


class Overloaded(ServiceError):
    """As many steps or bytes as the gateway queues."""

    reason = "OVERLOADED"
    retry_after = 0.1


class MessageTooLarge(ServiceError):
    """A message or a chunk over the limit. Sending it again will not help."""

    reason = "MESSAGE_TOO_LARGE"


class ExecutorUnavailable(ServiceError):
    """The model could not be run now. Nothing was committed."""

    reason = "EXECUTOR_UNAVAILABLE"
    retry_after = 0.5


class StoreUnavailable(ServiceError):
    """The store could not be asked. Nothing was committed."""

    reason = "STORE_UNAVAILABLE"
    retry_after = 0.5


class Draining(ServiceError):
    """This gateway is going away and takes nothing new. Nothing was committed."""

    reason = "DRAINING"
    retry_after = 0.1


class CommitUnknown(ServiceError):
    """The store did not answer the commit: repeat the step with the same position to find out."""

    reason = "COMMIT_UNKNOWN"
    retry_after = 0.5


class DeadlineExceeded(ServiceError):
    """The step's time limit passed before it was committed."""

    reason = "DEADLINE_EXCEEDED"


class StepCancelled(ServiceError):
    """The caller cancelled the step."""

    reason = "CANCELLED"


class BadModelOutput(ServiceError):
    """The model answered NaN, Inf or a wrong shape. Nothing was committed."""

    reason = "BAD_MODEL_OUTPUT"


class CorruptState(ServiceError):
    """A stored state fails its checksum or size. It is never run on."""

    reason = "CORRUPT_STATE"


class Unauthenticated(ServiceError):
    """No credentials, or none that hold."""

    reason = "UNAUTHENTICATED"


class ModelLoadError(Exception):
    """Start-up: no model could be loaded. Told to the operator, never to a client."""
