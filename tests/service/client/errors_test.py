import inspect
import pickle

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from service import errors as gateway_errors
from service.client import GatewayError, ModelNotFound, PositionMismatch, SessionNotFound, StepConflict
from service.client.errors import from_call, from_status
from service.status import STATUS_OF, status_of

TYPED = {
    "POSITION_MISMATCH": PositionMismatch,
    "STEP_CONFLICT": StepConflict,
    "SESSION_NOT_FOUND": SessionNotFound,
    "MODEL_NOT_FOUND": ModelNotFound,
}


def raised_by_the_gateway(kind):
    """An instance of one of the gateway's own exceptions."""
    arguments = {"field": "inputs.shape"} if "field" in inspect.signature(kind).parameters else {}
    return kind("what was expected and what came", limit=7, **arguments)


class FailedCall(grpc.RpcError):
    def __init__(self, *trailing):
        self._trailing = trailing or None

    def code(self):
        return grpc.StatusCode.UNAVAILABLE

    def details(self):
        return "connection refused"

    def trailing_metadata(self):
        return self._trailing


@pytest.mark.parametrize("kind", STATUS_OF, ids=lambda kind: kind.reason)
def test_every_error_of_the_gateway_is_read_whole(kind):
    raised = raised_by_the_gateway(kind)
    error = from_status(status_of(raised))
    assert isinstance(error, grpc.RpcError)
    assert type(error) is TYPED.get(raised.reason, GatewayError)
    assert error.code() is STATUS_OF[kind]
    assert (error.reason, error.details()) == (raised.reason, raised.message)
    assert error.metadata == {"limit": "7"}
    assert error.retry_after == raised.retry_after
    fields = [violation.field for violation in error.field_violations]
    assert fields == (["inputs.shape"] if isinstance(raised, gateway_errors.InvalidRequest) else [])
    assert error.code().name in str(error)
    assert raised.message in str(error)


def test_a_mismatch_tells_where_the_session_stands():
    error = from_status(status_of(gateway_errors.PositionMismatch("no", position=12, last_begin=9)))
    assert (error.position, error.last_begin) == (12, 9)
    fresh = from_status(status_of(gateway_errors.PositionMismatch("no", position=0, last_begin="")))
    assert (fresh.position, fresh.last_begin) == (0, None)


@pytest.mark.parametrize(
    ("code", "unknown"),
    [
        (grpc.StatusCode.UNAVAILABLE, True),
        (grpc.StatusCode.DEADLINE_EXCEEDED, True),
        (grpc.StatusCode.CANCELLED, True),
        (grpc.StatusCode.INVALID_ARGUMENT, False),
        (grpc.StatusCode.ABORTED, False),
    ],
)
def test_the_outcome_is_unknown_where_an_answer_may_be_lost(code, unknown):
    assert GatewayError(code, "").outcome_unknown is unknown


def test_a_call_that_never_reached_a_gateway_has_code_and_text():
    error = from_call(FailedCall())
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert (error.details(), error.reason, error.metadata, error.retry_after) == ("connection refused", "", {}, None)


def test_details_of_a_call_are_read_from_its_trailing_metadata():
    status = status_of(gateway_errors.SessionNotFound("gone", session_id="a"))
    error = from_call(FailedCall(("x-proxy", "p"), ("grpc-status-details-bin", status.SerializeToString())))
    assert isinstance(error, SessionNotFound)
    assert error.metadata == {"session_id": "a"}
    assert ("x-proxy", "p") in error.trailing_metadata()


@pytest.mark.parametrize("value", [b"\xff\xff\xff", "text"])
def test_details_that_are_not_a_status_are_ignored(value):
    error = from_call(FailedCall(("grpc-status-details-bin", value)))
    assert (error.code(), error.reason) == (grpc.StatusCode.UNAVAILABLE, "")


def test_details_and_codes_of_other_kinds_are_left_out():
    status = status_pb2.Status(code=99, message="from the future")
    status.details.add().Pack(error_details_pb2.Help())
    error = from_status(status)
    assert (error.code(), error.reason, error.details()) == (grpc.StatusCode.UNKNOWN, "", "from the future")


def test_an_error_survives_pickling():
    error = from_status(status_of(gateway_errors.PositionMismatch("no", position=12, last_begin=9)))
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is PositionMismatch
    assert (str(copy), copy.position, copy.code()) == (str(error), 12, error.code())
