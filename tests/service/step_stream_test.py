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


async def test_a_step_does_not_overtake_one_of_its_session_that_has_a_task():
    begun, answered = [], []
    hold = asyncio.Event()

    async def answer(request):
        await hold.wait()
        answered.append(request.request_id)
        return pb.StepResponse(request_id=request.request_id)

    def begin(request, arrived):
        begun.append(request.request_id)

    async def messages():
        requests = [pb.StepRequest(request_id=name, session_id=name[0]) for name in ("a1", "a2", "b1")]
        yield pb.StreamStepsRequest(requests=requests)
        await settled()
        hold.set()

    run = StepStream(
        answer=answer,
        refuse=lambda request, error: pb.StepResponse(),
        check=lambda message: None,
        max_steps=10,
        drained=asyncio.Event(),
        begin=begin,
    ).run(messages())
    assert sorted([r.request_id async for message in run for r in message.responses]) == ["a1", "a2", "b1"]
    assert begun == ["a1", "b1"]  # the second of its session was not even asked for
    assert answered == ["a1", "a2", "b1"]


async def test_a_step_that_turns_out_to_need_a_task_gets_one():
    class Handle:
        def cancel(self):
            raise AssertionError("nobody cancelled it")

    async def answer(request):
        return pb.StepResponse(request_id=request.request_id)

    def begin(request, arrived):
        handle = Handle()
        asyncio.get_running_loop().call_soon(arrived, handle, None)
        return handle

    async def messages():
        yield pb.StreamStepsRequest(requests=[pb.StepRequest(request_id="a", session_id="s")])

    run = StepStream(
        answer=answer,
        refuse=lambda request, error: pb.StepResponse(),
        check=lambda message: None,
        max_steps=10,
        drained=asyncio.Event(),
        begin=begin,
    ).run(messages())
    assert [r.request_id async for message in run for r in message.responses] == ["a"]
