"""What a call is refused with, and streams to try it on."""

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status.rpc_status import from_call


def reason_of(status):
    info = error_details_pb2.ErrorInfo()
    (found,) = [detail for detail in status.details if detail.Is(info.DESCRIPTOR)]
    found.Unpack(info)
    assert info.domain == "ntm-serving"
    return info.reason


async def refused(call):
    """The code, reason and rich status that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = from_call(caught.value)
    return caught.value.code(), reason_of(status), status


async def stream(running, *messages):
    """Sends messages on a stream of its own; the responses by request id."""

    async def send():
        for message in messages:
            yield message

    return {r.request_id: r async for m in running.stub.StreamSteps(send()) for r in m.responses}
