import asyncio

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2

from service import errors
from service.status import STATUS_OF, status_of


def all_errors(base=errors.ServiceError):
    for kind in base.__subclasses__():
        yield kind
        yield from all_errors(kind)


CONCRETE = [kind for kind in all_errors() if kind is not errors.InvalidRequest]


def make(kind):
    return kind("what happened", field="x") if issubclass(kind, errors.InvalidRequest) else kind("what happened", n=7)


def unpack(status, kind):
    found = [kind() for detail in status.details if detail.Is(kind.DESCRIPTOR)]
    for message, detail in zip(found, (d for d in status.details if d.Is(kind.DESCRIPTOR)), strict=True):
        assert isinstance(detail, any_pb2.Any)
        assert detail.Unpack(message)
    return found


@pytest.mark.parametrize("kind", CONCRETE)
def test_every_error_has_a_row_in_the_table_and_carries_one_error_info(kind):
    status = status_of(make(kind))
    assert status.code == STATUS_OF[kind].value[0]
    assert status.message == "what happened"
    (info,) = unpack(status, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain) == (kind.reason, "ntm-serving")


@pytest.mark.parametrize("kind", CONCRETE)
def test_only_what_a_retry_may_mend_says_when(kind):
    retries = unpack(status_of(make(kind)), error_details_pb2.RetryInfo)
    mends = {
        errors.SessionLimit,
        errors.Overloaded,
        errors.ExecutorUnavailable,
        errors.StoreUnavailable,
        errors.Draining,
        errors.CommitUnknown,
    }
    assert bool(retries) == (kind in mends)
    for retry in retries:
        assert retry.retry_delay.ToNanoseconds() > 0


def test_a_wrong_field_is_named():
    (bad,) = unpack(status_of(errors.InvalidTensor("no", field="inputs.shape")), error_details_pb2.BadRequest)
    assert [(v.field, v.description) for v in bad.field_violations] == [("inputs.shape", "no")]


def test_facts_travel_as_text():
    (info,) = unpack(status_of(errors.PositionMismatch("no", position=7)), error_details_pb2.ErrorInfo)
    assert dict(info.metadata) == {"position": "7"}


def test_a_bug_tells_the_client_nothing_of_its_text():
    status = status_of(RuntimeError("secret"))
    assert status.code == grpc.StatusCode.INTERNAL.value[0]
    assert "secret" not in str(status)


def test_a_cancelled_step_is_cancelled():
    assert status_of(asyncio.CancelledError()).code == grpc.StatusCode.CANCELLED.value[0]


def test_reasons_are_unique():
    reasons = [kind.reason for kind in CONCRETE]
    assert len(set(reasons)) == len(reasons)
