"""One stream of steps against a client that does not take its responses."""

import asyncio
import contextvars
import gc
import sys

import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.errors import MessageTooLarge
from service.identity import Principal, current, set_caller
from service.step_stream import StepStream, answer_of


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


async def parsed(responses):
    """A stream's messages, of its bytes."""
    try:
        async for data in responses:
            yield pb.StreamStepsResponse.FromString(data)
    finally:
        await responses.aclose()


def stream_of(client, *, max_steps=1000, output_bytes=0, check=lambda message: None):
    async def answer(request):
        return pb.StepResponse(request_id=request.request_id, outputs=tensor_pb2.Tensor(content=bytes(output_bytes)))

    stream = StepStream(
        answer=answer,
        refuse=lambda request, error: pb.StepResponse(request_id=request.request_id),
        check=check,
        max_steps=max_steps,
        drained=asyncio.Event(),
    )
    return parsed(stream.run(client.messages()))


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


async def test_responses_that_are_not_taken_wait_in_one_message():
    """A message each takes Python ten times their bytes, for every step of every stream that is not read."""
    client = Client(400)
    responses = stream_of(client)
    first = await anext(responses)
    gc.collect()
    before = sys.getallocatedblocks()
    await settled()
    waiting = sys.getallocatedblocks() - before
    assert client.read == 400
    assert waiting < 400
    second = await anext(responses)
    assert len(first.responses) + len(second.responses) == 800


@pytest.mark.parametrize("form", ["together", "alone"])
async def test_a_step_does_not_overtake_one_of_its_session_that_has_a_task(form):
    begun, answered = [], []
    hold = asyncio.Event()

    async def answer(request):
        await hold.wait()
        answered.append(request.request_id)
        return pb.StepResponse(request_id=request.request_id)

    def begin(requests, arrived):
        begun.extend(request.request_id for request in requests)
        return (), requests

    def begin_one(request, arrived):
        begun.append(request.request_id)

    async def messages():
        requests = [pb.StepRequest(request_id=name, session_id=name[0]) for name in ("a1", "a2", "b1")]
        for message in [pb.StreamStepsRequest(requests=requests)] if form == "together" else requests:
            yield message
        await settled()
        hold.set()

    stream = StepStream(
        answer=answer,
        refuse=lambda request, error: pb.StepResponse(),
        check=lambda message: None,
        max_steps=10,
        drained=asyncio.Event(),
        begin=begin,
        begin_one=begin_one,
    )
    run = parsed(stream.run(messages()))
    assert sorted([r.request_id async for message in run for r in message.responses]) == ["a1", "a2", "b1"]
    assert begun == ["a1", "b1"]  # the second of its session was not even asked for
    assert sorted(answered) == ["a1", "a2", "b1"]
    assert answered.index("a1") < answered.index("a2")


@pytest.mark.parametrize("form", ["requests", "columns", "alone"])
async def test_few_steps_of_a_session_have_tasks_while_its_first_is_held(form):
    begun, hold = [], asyncio.Event()

    async def answer(request):
        begun.append(request.request_id)
        await hold.wait()
        return pb.StepResponse(request_id=request.request_id)

    async def messages():
        names = [str(number) for number in range(1000)]
        if form == "requests":
            yield pb.StreamStepsRequest(requests=[pb.StepRequest(request_id=name, session_id="s") for name in names])
        elif form == "alone":
            for name in names:
                yield pb.StepRequest(request_id=name, session_id="s")
        else:
            inputs = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=[1000, 1, 1], content=bytes(4000))
            columns = pb.StepColumns(request_ids=names, session_ids=["s"] * 1000, positions=[0] * 1000, inputs=inputs)
            yield pb.StreamStepsRequest(columns=[columns])

    stream = StepStream(
        answer=answer,
        refuse=None,
        check=lambda message: None,
        max_steps=2000,
        drained=asyncio.Event(),
    )
    run = parsed(stream.run(messages()))
    reading = asyncio.ensure_future(anext(run))
    await settled()
    assert 1 < len(begun) <= 100
    hold.set()
    came = [r.request_id for r in (await reading).responses]
    async for message in run:
        came += [r.request_id for r in message.responses]
    assert came == begun == [str(number) for number in range(1000)]


class Handle:
    """Steps without tasks, by their requests."""

    def __init__(self, requests, arrived):
        self.open = {request.request_id: request for request in requests}
        self.cancelled = []
        self._arrived = arrived

    def __len__(self):
        return len(self.open)

    def names(self):
        return tuple(self.open)

    def cancel(self, request_id=None):
        for name in self.names() if request_id is None else [request_id]:
            self.cancelled.append(name)
            self.end([name])

    def end(self, names, *, tasks=()):
        gone = {name: self.open.pop(name) for name in (*names, *tasks)}
        answer = answer_of(*(pb.StepResponse(request_id=name) for name in names))
        self._arrived(self, [answer], [gone[name] for name in tasks])


def stream_with(handles, messages, *, max_steps=10, in_tasks=None):
    async def answer(request):
        if in_tasks is not None:
            in_tasks.append(request.request_id)
        return pb.StepResponse(request_id=request.request_id)

    def begin(requests, arrived):
        handles.append(Handle(requests, arrived))
        return handles[-1:], ()

    stream = StepStream(
        answer=answer,
        refuse=lambda request, error: pb.StepResponse(request_id=request.request_id),
        check=lambda message: None,
        max_steps=max_steps,
        drained=asyncio.Event(),
        begin=begin,
    )
    return parsed(stream.run(messages))


def requests_of(*names):
    return [pb.StepRequest(request_id=name, session_id=name[0]) for name in names]


async def test_a_step_that_turns_out_to_need_a_task_gets_one():
    handles, in_tasks = [], []

    async def messages():
        yield pb.StreamStepsRequest(requests=requests_of("a", "b", "c"))
        await settled()
        handles[0].end(["a"], tasks=["c"])
        handles[0].end(["b"])

    run = stream_with(handles, messages(), in_tasks=in_tasks)
    assert sorted([r.request_id async for message in run for r in message.responses]) == ["a", "b", "c"]
    assert in_tasks == ["c"]


async def test_two_steps_of_one_session_do_not_go_together():
    handles = []

    async def messages():
        yield pb.StreamStepsRequest(requests=requests_of("a1", "b1", "a2", "c1", "c2", "b2"))
        await settled()
        assert [handle.names() for handle in handles] == [("a1", "b1"), ("a2", "c1"), ("c2", "b2")]
        for handle in handles:
            handle.end(handle.names())

    run = stream_with(handles, messages())
    came = [r.request_id async for message in run for r in message.responses]
    assert came == ["a1", "b1", "a2", "c1", "c2", "b2"]


async def test_steps_without_tasks_are_cancelled_by_their_ids_and_all_of_them_when_the_stream_ends():
    handles = []

    async def messages():
        yield pb.StreamStepsRequest(requests=requests_of("a", "b", "c"), cancel=["b", "nobody"])
        await asyncio.Event().wait()

    run = stream_with(handles, messages())
    assert [r.request_id for r in (await anext(run)).responses] == ["b"]
    assert handles[0].cancelled == ["b"]
    await run.aclose()
    assert handles[0].cancelled == ["b", "a", "c"]


async def test_a_message_with_more_steps_than_may_be_under_way_is_taken_in_parts():
    handles = []

    async def messages():
        yield pb.StreamStepsRequest(requests=requests_of(*"abcdefg"))

    run = stream_with(handles, messages(), max_steps=3)
    came = []
    reading = asyncio.ensure_future(anext(run))
    while len(came) < 7:
        await settled()
        assert sum(map(len, handles)) <= 3
        handles[-1].end(handles[-1].names())
        came += [r.request_id for r in (await reading).responses]
        reading = asyncio.ensure_future(anext(run, None))
    assert (came, await reading) == (list("abcdefg"), None)


async def test_responses_that_are_too_many_for_a_message_are_sent_in_several():
    size = 300_000
    handles = []

    class Large(Handle):
        def end(self, names, *, tasks=()):
            for name in names:
                del self.open[name]
            outputs = tensor_pb2.Tensor(content=bytes(size))
            answers = [answer_of(pb.StepResponse(request_id=name, outputs=outputs)) for name in names]
            self._arrived(self, answers, ())

    def begin(requests, arrived):
        handles.append(Large(requests, arrived))
        return handles[-1:], ()

    async def messages():
        yield pb.StreamStepsRequest(requests=requests_of(*"abcdefghijklmnopq"))
        await settled()
        handles[0].end(handles[0].names())

    stream = StepStream(
        answer=None, refuse=None, check=lambda message: None, max_steps=100, drained=asyncio.Event(), begin=begin
    )
    run = parsed(stream.run(messages()))
    came = [message async for message in run]
    assert [r.request_id for message in came for r in message.responses] == list("abcdefghijklmnopq")
    assert all(message.ByteSize() <= 2 * 1024 * 1024 for message in came)


async def test_a_step_that_is_left_to_a_task_runs_as_its_own_stream_s_caller():
    """Whoever tells that it is left to one does so in another context, in which somebody else may be the caller."""
    callers, left = [], []

    async def answer(request):
        callers.append(current().name)
        return pb.StepResponse(request_id=request.request_id)

    class Handle:
        def __len__(self):
            return 0

        def names(self):
            return ()

        def cancel(self, request_id=None):
            pass

    handle = Handle()

    def begin(requests, arrived):
        left.append((requests, arrived))
        return (handle,), ()

    async def messages():
        yield pb.StreamStepsRequest(requests=[pb.StepRequest(request_id="1", session_id="s")])
        await settled()
        (requests, arrived), elsewhere = left[0], contextvars.Context()
        elsewhere.run(set_caller, lambda: Principal(name="other"))
        elsewhere.run(arrived, handle, (), requests)

    set_caller(lambda: Principal(name="own"))
    stream = StepStream(
        answer=answer,
        refuse=None,
        check=lambda message: None,
        max_steps=10,
        drained=asyncio.Event(),
        begin=begin,
    )
    run = parsed(stream.run(messages()))
    answered = [response.request_id async for message in run for response in message.responses]
    assert (answered, callers) == (["1"], ["own"])


async def test_no_more_is_read_of_steps_that_come_alone_than_may_be_under_way():
    handles, read = [], []

    def begin_one(request, arrived):
        handles.append(Handle([request], arrived))
        return handles[-1]

    def begin(requests, arrived):  # for those that had to wait for room
        return [begin_one(request, arrived) for request in requests], ()

    async def messages():
        for request in requests_of(*"abcdefghij"):
            read.append(request.request_id)
            yield request

    stream = StepStream(
        answer=None, refuse=None, check=None, max_steps=3, drained=asyncio.Event(), begin=begin, begin_one=begin_one
    )
    run = parsed(stream.run(messages()))
    came = []
    for steps in (3, 3, 3, 1):
        reading = asyncio.ensure_future(anext(run))
        await settled()
        assert len(handles) == steps
        assert len(read) <= len(came) + 4  # the one that waits for room has been read
        for handle in handles:
            handle.end(handle.names())
        handles.clear()
        came += [response.request_id for response in (await reading).responses]
    assert came == list("abcdefghij")
    assert [message async for message in run] == []
