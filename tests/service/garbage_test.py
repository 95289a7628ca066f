"""What ends a call leaves nothing behind that waits for the garbage collector, but for what gRPC leaves itself."""

import gc

import grpc
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import BadModelOutput
from tests.service.refusals import refused
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


async def frames_left(fail):
    """The names of the frames that ten more calls that fail leave to the garbage collector."""
    for _ in range(3):
        await fail()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(10):
            await fail()
        gc.collect()
        return [found.f_code.co_qualname for found in gc.garbage if type(found).__name__ == "frame"]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize(("method", "data"), ENDS.values(), ids=ENDS)
async def test_a_call_that_fails_leaves_no_frames_in_cycles(method, data):
    async with running_gateway() as running:
        frames = await frames_left(lambda: call(running.channel, method, data))
    assert not [name for name in frames if "test" not in name]


async def test_a_step_that_fails_in_its_batch_leaves_no_frames_in_cycles():
    def fault(batch):
        raise BadModelOutput("the model failed")

    request = step_request("a", random_inputs(1), 0)
    async with running_gateway() as running:
        await running.create("a")
        running.executor.fault = fault
        _, reason, _ = await refused(running.stub.Step(request))
        assert reason == "BAD_MODEL_OUTPUT"
        frames = await frames_left(lambda: call(running.channel, "Step", request.SerializeToString()))
        running.executor.fault = None
        assert (await running.stub.Step(request)).position == 1
    assert not [name for name in frames if "test" not in name]
