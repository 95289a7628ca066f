"""One stream of steps against a client that does not take its responses."""

import asyncio

import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.errors import MessageTooLarge
from service.step_stream import StepStream


class Client:
    """Sends ``count`` messages of two steps each, and counts how many of them were read."""

    def __init__(self, count):
        self.read = 0
        self._count = count

    async def messages(self):
        for number in range(self._count):
            await asyncio.sleep(0)
            self.read += 1
            yield pb.StreamStepsRequest(requests=[pb.StepRequest(request_id=f"{number}-{part}") for part in "ab"])


def stream_of(client, *, max_steps=1000, output_bytes=0, check=lambda message: None):
    async def answer(request):
        return pb.StepResponse(request_id=request.request_id, outputs=tensor_pb2.Tensor(content=bytes(output_bytes)))

    return StepStream(
        answer=answer,
        refuse=lambda request, error: pb.StepResponse(request_id=request.request_id),
        check=check,
        max_steps=max_steps,
        drained=asyncio.Event(),
    ).run(client.messages())


def refuse_all(message):
    raise MessageTooLarge("too large", limit=1)


async def settled():
    """Everything that can happen without the client has happened."""
    for _ in range(1000):
        await asyncio.sleep(0)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"max_steps": 8}, 10),
        ({"max_steps": 8, "check": refuse_all}, 10),
        ({"output_bytes": 4 * 1024 * 1024}, 10),
    ],
    ids=["steps", "refused steps", "bytes"],
)
async def test_a_client_that_takes_no_responses_is_not_read_further_and_gets_all_of_them_later(options, most):
    client = Client(200)
    responses = stream_of(client, **options)
    came = list((await anext(responses)).responses)
    await settled()
    assert client.read <= most
    async for message in responses:
        came.extend(message.responses)
    assert client.read == 200
    assert sorted(response.request_id for response in came) == sorted(
        f"{n}-{part}" for n in range(200) for part in "ab"
    )
