import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.bounds import bounded, has_more_fields
from service.errors import InvalidArgument, MessageTooLarge
from tests.service.support import random_inputs, running_gateway, step_request

EMPTY_STEP = b"\x0a\x00"
SERVICE = "/ntm_serving.v1.SequenceService/"


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 400))
def test_fields_are_counted_as_the_parser_finds_them(steps, cancels, size):
    message = pb.StreamStepsRequest(cancel=["x" * size] * cancels)
    for _ in range(steps):
        message.requests.append(step_request("s" * size, random_inputs(2), 3))
    data = message.SerializeToString()
    assert not has_more_fields(data, steps + cancels)
    assert steps + cancels == 0 or has_more_fields(data, steps + cancels - 1)


@given(st.binary(max_size=300))
def test_any_bytes_are_looked_through(data):
    assert not has_more_fields(data, len(data))


@pytest.mark.parametrize(
    "filler",
    [b"\x08\x01", b"\x09" + bytes(8), b"\x0d" + bytes(4), b"\xa2\x06\x00", b"\x0b\x0c"],
    ids=["varint", "fixed64", "fixed32", "unknown field", "group"],
)
def test_no_other_field_hides_the_steps_behind_it(filler):
    assert has_more_fields(filler + EMPTY_STEP * 100, 99)


def test_what_is_parsed_is_what_the_parser_gives():
    parse = bounded(pb.StreamStepsRequest.FromString, 100_000, 1 << 20)
    message = pb.StreamStepsRequest(requests=[step_request("s", random_inputs(5000), 0)] * 3)
    assert parse(message.SerializeToString()) == message
    assert isinstance(parse(b"\x0a\xff\xff\xff\x7f" + bytes(100_000)).error(), InvalidArgument)
    assert isinstance(parse(EMPTY_STEP * 100_001).error(), MessageTooLarge)


async def send(channel, method, data):
    if method != "StreamSteps":
        return await channel.unary_unary(SERVICE + method)(data)
    call = channel.stream_stream(SERVICE + method)()
    await call.write(data)
    return await call.read()


@pytest.mark.parametrize("method", ["BatchStep", "StreamSteps"])
async def test_a_message_of_a_million_empty_steps_is_refused_unparsed(method):
    data = EMPTY_STEP * 1_000_000
    async with running_gateway() as running:
        await running.create("s")
        with pytest.raises(grpc.aio.AioRpcError, match="more than 16384 steps") as caught:
            await send(running.channel, method, data)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert (await running.stub.Step(step_request("s", random_inputs(1), 0))).position == 1


@pytest.mark.parametrize("method", ["Step", "CreateSession", "BatchStep", "StreamSteps"])
async def test_bytes_that_are_no_message_are_the_sender_s_fault(method, caplog):
    async with running_gateway() as running:
        with pytest.raises(grpc.aio.AioRpcError, match="the message cannot be read") as caught:
            await send(running.channel, method, b"\x0a\xff\xff\xff\x7f")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_shape_of_a_million_dimensions_is_refused_in_few_words():
    request = step_request("s", random_inputs(1), 0)
    request.inputs.shape.extend([1] * 1_000_000)
    async with running_gateway() as running:
        await running.create("s")
        with pytest.raises(grpc.aio.AioRpcError, match="has 1000002 dimensions"):
            await running.stub.Step(request)
