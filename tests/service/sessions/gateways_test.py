"""Two whole gateways over one store: no session belongs to either, and neither hides what the store says."""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.sessions.redis import RedisStore
from tests.service.sessions.benches import PATIENCE, impatient
from tests.service.sessions.valkey import Valkey
from tests.service.support import NumpyExecutor, outputs_of, random_inputs, run_whole, running_gateway, step_request


@pytest.fixture
async def two(valkey, prefix):
    async with contextlib.AsyncExitStack() as stack:
        yield [await gateway_over(stack, valkey.url, prefix) for _ in range(2)]


async def gateway_over(stack, url, prefix):
    store = RedisStore(url, max_sessions=100, prefix=prefix, **PATIENCE)
    return await stack.enter_async_context(running_gateway(NumpyExecutor(), store))


def info_of(details):
    """What the service says about an error."""
    info = error_details_pb2.ErrorInfo()
    (packed,) = [detail for detail in details if detail.Is(info.DESCRIPTOR)]
    packed.Unpack(info)
    return info


def reason_of(error):
    """An error's code, its reason and what it says about the session."""
    info = info_of(rpc_status.from_call(error).details)
    return error.code(), info.reason, dict(info.metadata)


async def failing(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return reason_of(caught.value)


async def test_a_session_goes_on_at_whichever_gateway_is_asked(two):
    inputs = random_inputs(12)
    await two[0].create("a")
    found = [
        outputs_of(await two[number % 2].stub.Step(step_request("a", inputs[3 * number : 3 * number + 3], 3 * number)))
        for number in range(4)
    ]
    np.testing.assert_array_equal(np.concatenate(found), run_whole(inputs)[0])
    for gateway in two:
        (listed,) = (await gateway.stub.ListSessions(pb.ListSessionsRequest())).sessions
        assert (listed.session_id, listed.position) == ("a", 12)


async def test_of_two_different_steps_at_one_position_one_is_applied_and_the_other_is_told_where_it_stands(two):
    """Both have run their step on the same state when the first of them commits."""
    first, other, shorter = random_inputs(3, seed=1), random_inputs(3, seed=2), random_inputs(2, seed=3)
    for name, rival in (("a", other), ("b", shorter)):
        await two[0].create(name)
        for gateway in two:
            gateway.executor.hold()
        calls = [two[0].stub.Step(step_request(name, first, 0)), two[1].stub.Step(step_request(name, rival, 0))]
        for gateway in two:
            await gateway.executor.entered.wait()
        two[0].executor.gate.set()
        np.testing.assert_array_equal(outputs_of(await calls[0]), run_whole(first)[0])
        two[1].executor.gate.set()
        code, reason, facts = await failing(calls[1])
        assert (code, reason) == (grpc.StatusCode.ABORTED, "STEP_CONFLICT")
        assert (facts["position"], facts["last_begin"]) == ("3", "0")
        after = random_inputs(2, seed=4)
        reply = await two[1].stub.Step(step_request(name, after, 3))
        np.testing.assert_array_equal(outputs_of(reply), run_whole(np.concatenate([first, after]))[0][3:])


async def test_the_same_step_at_both_is_applied_once_and_answered_twice(two):
    inputs, after = random_inputs(3), random_inputs(2, seed=1)
    await two[0].create("a")
    for gateway in two:
        gateway.executor.hold()
    calls = [gateway.stub.Step(step_request("a", inputs, 0)) for gateway in two]
    for gateway in two:
        await gateway.executor.entered.wait()
    for gateway in two:
        gateway.executor.gate.set()
    for reply in await asyncio.gather(*calls):
        assert reply.position == 3
        np.testing.assert_array_equal(outputs_of(reply), run_whole(inputs)[0])
    reply = await two[0].stub.Step(step_request("a", after, 3))
    np.testing.assert_array_equal(outputs_of(reply), run_whole(np.concatenate([inputs, after]))[0][3:])


async def test_a_gateway_whose_copy_is_old_tells_the_stores_position(two):
    await two[0].create("a")
    for position in (0, 2, 4):
        await two[position // 2 % 2].stub.Step(step_request("a", random_inputs(2, seed=position), position))
    # The second gateway has the session at 4; it stands at 6, and its last step began at 4.
    for position in (2, 3, 5, 7):
        code, reason, facts = await failing(two[1].stub.Step(step_request("a", random_inputs(2), position)))
        assert (code, reason) == (grpc.StatusCode.ABORTED, "POSITION_MISMATCH")
        assert (facts["position"], facts["last_begin"]) == ("6", "4")
    assert (await two[1].stub.Step(step_request("a", random_inputs(1), 6))).position == 7


async def test_what_is_deleted_at_one_is_gone_at_the_other(two):
    await two[0].create("a")
    await two[1].stub.Step(step_request("a", random_inputs(1), 0))
    await two[0].stub.DeleteSession(pb.DeleteSessionRequest(session_id="a"))
    code, reason, _ = await failing(two[1].stub.Step(step_request("a", random_inputs(1), 1)))
    assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")


async def test_what_the_client_is_told_while_the_store_is_down_and_that_it_goes_on(tmp_path):
    """Stopped in the midst of a commit: outcome unknown. Gone: unavailable. Back: the same step, once."""
    server = Valkey(tmp_path / "valkey", appendonly="yes", appendfsync="always").start()
    inputs = random_inputs(4)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(server.stop)
        gateway = await gateway_over(stack, server.url, "ntm:")
        await gateway.create("a")
        await gateway.stub.Step(step_request("a", inputs[:2], 0))
        gateway.executor.hold()
        call = gateway.stub.Step(step_request("a", inputs[2:], 2))
        await gateway.executor.entered.wait()
        server.freeze()
        gateway.executor.gate.set()
        server.kill()
        code, reason, _ = await failing(call)
        assert code is grpc.StatusCode.UNAVAILABLE
        assert reason in {"COMMIT_UNKNOWN", "STORE_UNAVAILABLE"}  # as the commit or the kill came first
        again = await failing(gateway.stub.Step(step_request("a", inputs[2:], 2)))
        assert again[:2] == (grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE")
        server.start()
        reply = await gateway.stub.Step(step_request("a", inputs[2:], 2))
        np.testing.assert_array_equal(outputs_of(reply), run_whole(inputs)[0][2:])


async def stream(gateway, *requests):
    """One message of steps; the responses by session."""
    call = gateway.stub.StreamSteps(iter([pb.StreamStepsRequest(requests=requests)]))
    return {response.session_id: response async for message in call for response in message.responses}


async def test_steps_of_streams_go_on_at_whichever_gateway_is_asked(two):
    """A gateway that goes on from its own commit, from one that it knows nothing of, and again from its own."""
    names = [f"s{number}" for number in range(8)]
    inputs = {name: random_inputs(12, seed=number) for number, name in enumerate(names)}
    for name in names:
        await two[0].create(name)
    found = {name: [] for name in names}
    for number, gateway in enumerate([two[0], two[0], two[1], two[1], two[0], two[0]]):
        begin, end = 2 * number, 2 * number + 2
        answers = await stream(gateway, *(step_request(name, inputs[name][begin:end], begin) for name in names))
        for name in names:
            assert answers[name].position == end
            found[name].append(outputs_of(answers[name]))
    for name in names:
        np.testing.assert_array_equal(np.concatenate(found[name]), run_whole(inputs[name])[0])


async def test_the_same_step_in_a_stream_at_both_is_applied_once_and_answered_twice(two):
    inputs = random_inputs(5)
    await two[0].create("a")
    for gateway in two:  # both have the session at hand
        await stream(gateway, step_request("a", inputs[:1], 0))
    for gateway in two:
        gateway.executor.hold()
    calls = [asyncio.create_task(stream(gateway, step_request("a", inputs[1:3], 1))) for gateway in two]
    for gateway in two:
        await gateway.executor.entered.wait()
    for gateway in two:
        gateway.executor.gate.set()
    for answers in await asyncio.gather(*calls):
        np.testing.assert_array_equal(outputs_of(answers["a"]), run_whole(inputs)[0][1:3])
    reply = (await stream(two[1], step_request("a", inputs[3:], 3)))["a"]
    np.testing.assert_array_equal(outputs_of(reply), run_whole(inputs)[0][3:])


async def test_a_step_of_a_stream_whose_commit_gets_no_answer_is_told_so_and_sent_again(tmp_path):
    server = Valkey(tmp_path / "valkey", appendonly="yes", appendfsync="always").start()
    inputs = random_inputs(4)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(server.stop)
        gateway = await gateway_over(stack, server.url, "ntm:")
        await gateway.create("a")
        await stream(gateway, step_request("a", inputs[:2], 0))
        server.freeze()
        with impatient(gateway.gateway.engine._store, 0.2):
            failed = (await stream(gateway, step_request("a", inputs[2:], 2)))["a"]
        assert info_of(failed.status.details).reason == "COMMIT_UNKNOWN"
        server.resume()
        reply = (await stream(gateway, step_request("a", inputs[2:], 2)))["a"]
        assert reply.position == 4
        np.testing.assert_array_equal(outputs_of(reply), run_whole(inputs)[0][2:])


async def test_a_broken_state_is_data_loss_and_never_run_on(two, valkey, prefix):
    await two[0].create("a")
    await two[0].stub.Step(step_request("a", random_inputs(2), 0))
    (key,) = valkey.client.keys(f"{prefix}session:*/a")
    body = bytearray(valkey.client.hget(key, "body"))
    body[-30] ^= 1
    valkey.client.hset(key, "body", bytes(body))
    for call in (
        two[1].stub.Step(step_request("a", random_inputs(1), 2)),
        two[1].stub.InspectSession(pb.InspectSessionRequest(session_id="a")),
    ):
        code, reason, _ = await failing(call)
        assert (code, reason) == (grpc.StatusCode.DATA_LOSS, "CORRUPT_STATE")
    assert two[1].executor.batches == []
