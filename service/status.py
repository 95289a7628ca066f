"""The one table from what went wrong to what the client sees: a gRPC status with rich details."""

import asyncio

import grpc
from google.protobuf import any_pb2
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from service import errors

DOMAIN = "ntm-serving"

STATUS_OF: dict[type[errors.ServiceError], grpc.StatusCode] = {
    errors.InvalidTensor: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidId: grpc.StatusCode.INVALID_ARGUMENT,
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.SessionNotFound: grpc.StatusCode.NOT_FOUND,
    errors.ModelNotFound: grpc.StatusCode.NOT_FOUND,
    errors.SessionExists: grpc.StatusCode.ALREADY_EXISTS,
    errors.PositionMismatch: grpc.StatusCode.ABORTED,
    errors.StepConflict: grpc.StatusCode.ABORTED,
    errors.ModelVersionUnavailable: grpc.StatusCode.FAILED_PRECONDITION,
    errors.FingerprintMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.SessionLimit: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.MessageTooLarge: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.ExecutorUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.StoreUnavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Draining: grpc.StatusCode.UNAVAILABLE,
    errors.CommitUnknown: grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.StepCancelled: grpc.StatusCode.CANCELLED,
    errors.BadModelOutput: grpc.StatusCode.INTERNAL,
    errors.CorruptState: grpc.StatusCode.DATA_LOSS,
}


def status_of(error: BaseException) -> status_pb2.Status:
    """The ``google.rpc.Status`` of any exception: its code, its message and its details.

    What is not a ``ServiceError`` is a bug of the gateway: it becomes INTERNAL, with nothing of its text, since that
    may hold what a client must not see.
    """
    if isinstance(error, asyncio.CancelledError):
        error = errors.StepCancelled("the step was cancelled")
    if not isinstance(error, errors.ServiceError):
        error = errors.ServiceError("internal error; the gateway's log has it")
    code = STATUS_OF.get(type(error), grpc.StatusCode.INTERNAL)
    return status_pb2.Status(code=code.value[0], message=error.message, details=[_any(m) for m in _details(error)])


def _details(error: errors.ServiceError) -> list[Message]:
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN, metadata=error.metadata)]
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.message)
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
    if error.retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(error.retry_after * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    return details


def _any(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed
