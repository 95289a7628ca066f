"""Steps as columns: they are the same steps as requests are, whatever is wrong with some of them."""

import asyncio
import itertools
from collections import Counter

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.alike import parse_columns, parse_requests
from service.answers import Answers
from service.columns import Columns, check_count
from service.errors import InvalidArgument, InvalidTensor, MessageTooLarge
from service.sessions.cohort import Replies
from service.types import StepReply
from tests.service.refusals import reason_of
from tests.service.support import INPUT_DIM, random_inputs, run_whole, running_gateway


def columns_of(names, inputs, positions=0, *, ids=None, seconds=None):
    """Steps of these sessions; ``inputs`` is ``[steps, time, input_dim]``."""
    inputs = np.asarray(inputs, "<f4")
    columns = pb.StepColumns(
        request_ids=names if ids is None else ids,
        session_ids=names,
        positions=[positions] * len(names) if isinstance(positions, int) else positions,
        inputs=tensor_pb2.Tensor(dtype=1, shape=inputs.shape, content=inputs.tobytes()),
    )
    if seconds is not None:
        columns.timeout.FromNanoseconds(round(seconds * 1e9))
    return columns


def results_of(messages):
    """Outputs and positions by request id, and the statuses of what failed."""
    results, failed, single = {}, {}, {}
    for message in messages:
        for columns in message.columns:
            outputs = np.frombuffer(columns.outputs.content, "<f4").reshape(columns.outputs.shape)
            assert columns.outputs.dtype == 1
            for name, position, row in zip(columns.request_ids, columns.positions, outputs, strict=True):
                results[name] = (position, row)
        for response in message.responses:
            if response.HasField("status"):
                failed[response.request_id] = response.status
            else:
                outputs = np.frombuffer(response.outputs.content, "<f4").reshape(response.outputs.shape)
                single[response.request_id] = (response.position, outputs)
    return results, failed, single


async def stream(running, *messages):
    async def send():
        for message in messages:
            yield message

    return [message async for message in running.stub.StreamSteps(send())]


def message_of(*columns, **rest):
    return pb.StreamStepsRequest(columns=columns, **rest)


async def test_columns_are_run_and_answered_as_columns():
    names = [f"s{n}" for n in range(20)]
    inputs = np.stack([random_inputs(5, seed) for seed in range(20)])
    async with running_gateway() as running:
        for name in names:
            await running.create(name)
        first = await stream(running, message_of(columns_of(names, inputs[:, :2])))
        assert first[0].takes_columns
        results, failed, single = results_of(first)
        assert (sorted(results), failed, single) == (sorted(names), {}, {})
        again = await stream(running, message_of(columns_of(names, inputs[:, :2], 0, ids=[f"r{n}" for n in names])))
        _, failed, replayed = results_of(again)  # looked up one by one: nothing of them runs
        assert failed == {}
        for name in names:
            assert replayed[f"r{name}"][0] == results[name][0] == 2
            np.testing.assert_array_equal(replayed[f"r{name}"][1], results[name][1])
        rest, failed, single = results_of(await stream(running, message_of(columns_of(names, inputs[:, 2:], 2))))
        assert (failed, single) == ({}, {})
        for name, whole in zip(names, inputs, strict=True):
            np.testing.assert_array_equal(np.concatenate([results[name][1], rest[name][1]]), run_whole(whole)[0])


async def test_only_the_first_message_of_a_stream_says_that_columns_are_taken():
    async with running_gateway() as running:
        await running.create("s")
        call = running.stub.StreamSteps()
        told = []
        for position in range(3):
            await call.write(message_of(columns_of(["s"], random_inputs(1)[None], position)))
            told.append((await call.read()).takes_columns)
        assert told == [True, False, False]
        await call.done_writing()


async def test_what_is_wrong_with_one_of_the_steps_is_its_own():
    names = ["good", "nobody", "behind", "bad id!", "twice", "twice", "last"]
    inputs = np.stack([random_inputs(2, seed) for seed in range(7)])
    async with running_gateway() as running:
        for name in ("good", "behind", "twice", "last"):
            await running.create(name)
        columns = columns_of(names, inputs, [0, 0, 5, 0, 0, 2, -1], ids=[str(n) for n in range(7)])
        results, failed, single = results_of(await stream(running, message_of(columns)))
        results.update(single)
        assert sorted(results) == ["0", "4", "5"]
        np.testing.assert_array_equal(results["0"][1], run_whole(inputs[0])[0])
        whole = run_whole(np.concatenate(inputs[4:6]))[0]
        np.testing.assert_array_equal(np.concatenate([results["4"][1], results["5"][1]]), whole)
        assert {name: reason_of(status) for name, status in failed.items()} == {
            "1": "SESSION_NOT_FOUND",
            "2": "POSITION_MISMATCH",
            "3": "INVALID_ID",
            "6": "INVALID_ARGUMENT",
        }


async def test_the_same_step_twice_among_columns_is_applied_once_and_answered_twice():
    inputs = np.stack([random_inputs(2)] * 3)
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        columns = columns_of(["a", "b", "a"], inputs, ids=["1", "2", "3"])
        async with asyncio.timeout(20):
            results, failed, single = results_of(await stream(running, message_of(columns)))
        results.update(single)
        assert (sorted(results), failed) == (["1", "2", "3"], {})
        for position, outputs in results.values():
            assert position == 2
            np.testing.assert_array_equal(outputs, run_whole(inputs[0])[0])
        assert (await running.stub.GetSession(pb.GetSessionRequest(session_id="a"))).position == 2


async def test_a_value_that_is_not_finite_fails_its_step_alone():
    inputs = np.stack([random_inputs(2, seed) for seed in range(3)])
    inputs[1, 1, 0] = np.nan
    async with running_gateway() as running:
        for name in "abc":
            await running.create(name)
        _, failed, single = results_of(await stream(running, message_of(columns_of(list("abc"), inputs))))
        assert sorted(single) == ["a", "c"]
        assert reason_of(failed["b"]) == "INVALID_TENSOR"


SPOILT = {
    "session_ids": lambda c: c.session_ids.pop(),
    "request_ids": lambda c: c.request_ids.pop(),
    "positions": lambda c: c.positions.append(0),
    "rank": lambda c: c.inputs.shape.pop(),
    "steps": lambda c: c.inputs.shape.__setitem__(0, 3),
    "negative": lambda c: c.inputs.shape.__setitem__(slice(None), [2, -2, -INPUT_DIM]),
    "no time": lambda c: (c.inputs.shape.__setitem__(1, 0), setattr(c.inputs, "content", b"")),
    "bytes": lambda c: setattr(c.inputs, "content", c.inputs.content[:-1]),
    "dtype": lambda c: setattr(c.inputs, "dtype", 0),
    "width": lambda c: c.inputs.shape.__setitem__(slice(None), [2, 1, 2 * INPUT_DIM]),
    "limit": lambda c: c.timeout.FromNanoseconds(-1),
    "long ids": lambda c: c.request_ids.__setitem__(slice(None), ["x" * 65, "y" * 65]),
}


@pytest.mark.parametrize("spoilt", SPOILT)
async def test_columns_that_make_no_sense_are_refused_step_by_step_and_the_stream_goes_on(spoilt):
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        bad = columns_of(["a", "b"], np.stack([random_inputs(2)] * 2))
        SPOILT[spoilt](bad)
        good = columns_of(["b"], random_inputs(2)[None], ids=["good"])
        messages = await stream(running, message_of(bad), message_of(good))
        results, failed, single = results_of(messages)
        assert list({**results, **single}) == ["good"]
        refusals = [r for message in messages for r in message.responses if r.HasField("status")]
        steps = max(len(bad.request_ids), len(bad.session_ids), len(bad.positions))
        assert len(refusals) == steps
        assert {reason_of(refusal.status) for refusal in refusals} <= {"INVALID_TENSOR", "INVALID_ARGUMENT"}
        assert len(failed) == len({*bad.request_ids, *[""] * (steps - len(bad.request_ids))})


@pytest.mark.parametrize(
    ("columns", "code"),
    [
        (pb.StepColumns(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.StepColumns(positions=[0] * 16_385), grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
    ids=["none", "too many"],
)
async def test_columns_that_cannot_be_refused_step_by_step_end_the_stream(columns, code):
    async with running_gateway() as running:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream(running, message_of(columns))
        assert caught.value.code() is code


async def rest_of(call):
    await call.done_writing()
    messages = []
    while (message := await call.read()) is not grpc.aio.EOF:
        messages.append(message)
    return messages


async def test_columns_wait_for_room_and_are_cancelled_and_time_out_step_by_step():
    names = [f"s{n}" for n in range(8)]
    async with running_gateway(max_stream_steps=3) as running:
        for name in names:
            await running.create(name)
        running.executor.hold()
        call = running.stub.StreamSteps()
        await call.write(message_of(columns_of(names, np.stack([random_inputs(1)] * 8))))
        await running.executor.entered.wait()
        assert running.gateway.engine._admission.steps <= 3
        running.executor.gate.set()
        results, failed, single = results_of(await rest_of(call))
        assert (sorted({**results, **single}), failed) == (names, {})

        running.executor.hold()
        call = running.stub.StreamSteps()
        inputs = np.stack([random_inputs(1)] * 3)
        await call.write(message_of(columns_of(names[:3], inputs, 1, ids=["c", "d", "e"])))
        await running.executor.entered.wait()
        await call.write(pb.StreamStepsRequest(cancel=["d"]))
        _, failed, _ = results_of([await call.read()])
        assert failed["d"].code == grpc.StatusCode.CANCELLED.value[0]
        running.executor.gate.set()
        results, failed, single = results_of(await rest_of(call))
        assert sorted({**results, **single}) == ["c", "e"]

        running.executor.hold()
        late = await stream(running, message_of(columns_of(["s7"], random_inputs(1)[None], 1, ids=["x"], seconds=0.02)))
        assert reason_of(results_of(late)[1]["x"]) == "DEADLINE_EXCEEDED"
        running.executor.gate.set()


async def test_a_message_of_requests_and_columns_keeps_the_order_of_a_session():
    whole = random_inputs(4)
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        request = pb.StepRequest(request_id="1", session_id="a", position=0)
        request.inputs.CopyFrom(tensor_pb2.Tensor(dtype=1, shape=[2, INPUT_DIM], content=whole[:2].tobytes()))
        columns = columns_of(["a", "b"], np.stack([whole[2:], whole[:2]]), [2, 0], ids=["2", "3"])
        results, failed, single = results_of(await stream(running, message_of(columns, requests=[request])))
        results.update(single)
        assert failed == {}
        np.testing.assert_array_equal(np.concatenate([results["1"][1], results["2"][1]]), run_whole(whole)[0])


values = st.floats(width=32)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 3), st.integers(1, 3))


@st.composite
def any_columns(draw):
    steps, time, width = draw(shapes)
    flat = draw(st.lists(values, min_size=steps * time * width, max_size=steps * time * width))
    inputs = np.array(flat, np.float32).reshape(steps, time, width)
    names = [f"s{n}" for n in range(steps)]
    positions = draw(st.lists(st.integers(-1, 9), min_size=steps, max_size=steps))
    seconds = draw(st.sampled_from([None, 0.0, -1.0, 1e-9, 2.5]))
    ids = draw(st.sampled_from([names, ["x" * 65, *names[1:]]]))
    return columns_of(names, inputs, positions, ids=ids, seconds=seconds)


@given(any_columns(), st.data())
def test_columns_can_be_cut_up_and_hold_the_same_steps(columns, data):
    message, columns = columns, Columns.of(columns)
    assert not any(isinstance(column, Message) for column in columns)  # which would keep all of the message
    columns.check()
    requests = columns.requests()
    assert [request.HasField("timeout") for request in requests] == [message.HasField("timeout")] * len(requests)
    assert all(request.timeout == message.timeout for request in requests)
    cuts = sorted(data.draw(st.sets(st.integers(1, len(requests)))) | {0, len(requests)})
    parts = [columns.part(begin, end) for begin, end in itertools.pairwise(cuts)]
    for part in parts:
        part.check()
    assert [request for part in parts for request in part.requests()] == requests
    assert [columns.request(at) for at in range(len(requests))] == requests
    assert sum(part.steps for part in parts) == len(requests)
    assert [(r.request_id, r.session_id) for r in columns.names()] == [(r.request_id, r.session_id) for r in requests]


@given(any_columns())
def test_columns_are_read_as_their_requests_are(columns):
    columns = Columns.of(columns)
    alike, others = parse_columns(columns, 20)
    single, refused = parse_requests(columns.requests(), 20)
    if refused:
        assert (alike, list(others)) == ((), columns.requests())
        return
    assert not others
    (steps,), (expected,) = alike, single
    assert (steps.limit, list(steps.names), list(steps.session_ids)) == (
        *(expected.limit, expected.names, expected.session_ids),
    )
    assert (list(steps.positions), list(steps.digests)) == (expected.positions, list(expected.digests))
    np.testing.assert_array_equal(steps.inputs, expected.inputs)
    assert [steps.request(place) for place in range(len(steps.names))] == columns.requests()


def test_results_are_rendered_in_blocks_that_fit_a_message():
    names = [f"s{n}" for n in range(9)]
    (steps,), _ = parse_columns(Columns.of(columns_of(names, np.zeros((9, 1, 2)))), 100)
    replies = [StepReply(n, np.full((100_000, 1), n, np.float32)) for n in range(7)]
    answers = steps.render(Answers(), [0, 1, 2, 4, 5, 6, 8], replies)
    assert [answer.steps for answer in answers] == [2, 2, 2, 1]
    message = pb.StreamStepsResponse.FromString(b"".join(answer.data for answer in answers))
    assert [len(columns.request_ids) for columns in message.columns] == [2, 2, 2, 1]
    results, _, _ = results_of([message])
    assert list(results) == ["s0", "s1", "s2", "s4", "s5", "s6", "s8"]
    assert [(position, row[0, 0]) for position, row in results.values()] == [(n, n) for n in range(7)]
    assert Counter(row.shape for _, row in results.values()) == {(100_000, 1): 7}


def test_responses_are_rendered_in_blocks_that_fit_a_message():
    names = [f"s{n}" for n in range(9)]
    (steps,), _ = parse_requests(Columns.of(columns_of(names, np.zeros((9, 1, 2)))).requests(), 100)
    replies = Replies(range(7), np.repeat(np.arange(7, dtype=np.float32), 100_000).reshape(7, 100_000, 1))
    for told in (replies, list(replies)):
        answers = steps.render(Answers(), [0, 1, 2, 4, 5, 6, 8], told)
        assert [answer.steps for answer in answers] == [2, 2, 2, 1]
        message = pb.StreamStepsResponse.FromString(b"".join(answer.data for answer in answers))
        assert [one.session_id for one in message.responses] == ["s0", "s1", "s2", "s4", "s5", "s6", "s8"]
        assert [one.position for one in message.responses] == list(range(7))
        for one, reply in zip(message.responses, replies, strict=True):
            assert one.outputs.content == reply.outputs.tobytes()
    assert not list(steps.render(Answers(), [], []))


@pytest.mark.parametrize("form", ["requests", "columns"])
def test_blocks_of_many_small_results_fit_a_message_as_well(form):
    names = [f"{number:05}" + 59 * "\N{GRINNING FACE}" for number in range(16_384)]
    columns = columns_of([f"{number:064}" for number in range(len(names))], np.zeros((len(names), 1, 1)))
    columns.request_ids[:] = names
    parsed = Columns.of(columns)
    (steps,), _ = parse_columns(parsed, 100) if form == "columns" else parse_requests(parsed.requests(), 100)
    replies = Replies([2**62] * len(names), np.zeros((len(names), 1, 1), np.float32))
    answers = steps.render(Answers(), range(len(names)), replies)
    assert sum(answer.steps for answer in answers) == len(names)
    assert max(len(answer.data) for answer in answers) <= 1024 * 1024
    message = pb.StreamStepsResponse.FromString(b"".join(answer.data for answer in answers))
    told = [one.request_id for one in message.responses] or [name for c in message.columns for name in c.request_ids]
    assert told == names


def test_counts_and_shapes_are_checked():
    message = message_of(columns_of(["a", "b"], np.zeros((2, 1, 2))), requests=[pb.StepRequest()])
    check_count(message, 3)
    with pytest.raises(MessageTooLarge, match="3 steps"):
        check_count(message, 2)
    with pytest.raises(InvalidArgument, match="no step"):
        check_count(message_of(pb.StepColumns()), 2)
    with pytest.raises(InvalidTensor, match="expected \\[2, time, input_dim\\]"):
        Columns.of(columns_of(["a", "b"], np.zeros((1, 1, 2)))).check()


async def test_columns_race_with_requests_for_a_session_and_each_step_is_applied_once():
    async with running_gateway() as running:
        await running.create("s")
        whole = random_inputs(12)
        step = columns_of(["s"], whole[None, :4], 0)
        messages = await asyncio.gather(*(stream(running, message_of(step)) for _ in range(8)))
        for part in messages:
            results, failed, single = results_of(part)
            assert failed == {}
            np.testing.assert_array_equal({**results, **single}["s"][1], run_whole(whole[:4])[0])
        assert (await running.stub.GetSession(pb.GetSessionRequest(session_id="s"))).position == 4
