"""What ends a call leaves nothing behind that waits for the garbage collector, but for what gRPC leaves itself."""

import gc

import grpc
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from tests.service.support import random_inputs, running_gateway, step_request

SERVICE = "/ntm_serving.v1.SequenceService/"
NOBODY = step_request("nobody", random_inputs(1))
ENDS = {
    "refused": ("Step", NOBODY.SerializeToString()),
    "unreadable": ("Step", b"\xff\xff"),
    "refused in a stream": ("StreamSteps", pb.StreamStepsRequest(requests=[NOBODY]).SerializeToString()),
    "unreadable in a stream": ("StreamSteps", b"\xff\xff"),
}


async def call(channel, method, data):
    try:
        if method == "Step":
            await channel.unary_unary(SERVICE + method)(data)
        else:
            async for _ in channel.stream_stream(SERVICE + method)(iter([data])):
                pass
    except grpc.RpcError:
        pass


@pytest.mark.parametrize(("method", "data"), ENDS.values(), ids=ENDS)
async def test_a_call_that_fails_leaves_no_frames_in_cycles(method, data):
    async with running_gateway() as running:
        for _ in range(3):
            await call(running.channel, method, data)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(10):
                await call(running.channel, method, data)
            gc.collect()
            frames = [found.f_code.co_qualname for found in gc.garbage if type(found).__name__ == "frame"]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
    assert not [name for name in frames if "test" not in name]
