"""Streams of steps over a real socket: what is cancelled, what is late, and who goes away."""

import asyncio

import grpc
import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from tests.service.refusals import reason_of, stream
from tests.service.support import outputs_of, random_inputs, run_whole, running_gateway, step_request


async def test_a_stream_carries_many_sessions_and_goes_on_after_a_failed_step():
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        inputs = random_inputs(4)
        responses = await stream(
            running,
            pb.StreamStepsRequest(
                requests=[
                    step_request("a", inputs[:2], 0, "1"),
                    step_request("b", inputs[:1], 7, "2"),
                    step_request("a", inputs[2:], 2, "3"),
                ]
            ),
            pb.StreamStepsRequest(requests=[step_request("b", inputs, 0, "4")]),
        )
        expected = run_whole(inputs)[0]
        np.testing.assert_array_equal(outputs_of(responses["1"]), expected[:2])
        assert reason_of(responses["2"].status) == "POSITION_MISMATCH"
        np.testing.assert_array_equal(outputs_of(responses["3"]), expected[2:])
        np.testing.assert_array_equal(outputs_of(responses["4"]), expected)


async def test_a_step_of_a_stream_is_cancelled_by_its_id_and_the_others_go_on():
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        running.executor.hold()
        inputs = random_inputs(2)
        call = running.stub.StreamSteps()
        await call.write(
            pb.StreamStepsRequest(requests=[step_request("a", inputs, 0, "1"), step_request("b", inputs, 0, "2")])
        )
        await running.executor.entered.wait()
        await call.write(pb.StreamStepsRequest(cancel=["1", "no such step"]))
        (cancelled,) = (await call.read()).responses
        assert cancelled.request_id == "1"
        assert cancelled.status.code == grpc.StatusCode.CANCELLED.value[0]
        running.executor.gate.set()
        await call.done_writing()
        (other,) = (await call.read()).responses
        np.testing.assert_array_equal(outputs_of(other), run_whole(inputs)[0])
        assert await call.read() is grpc.aio.EOF
        again = await running.stub.Step(step_request("a", inputs, 0))
        np.testing.assert_array_equal(outputs_of(again), run_whole(inputs)[0])


async def test_the_time_limit_of_one_step_is_its_own():
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        running.executor.hold()
        inputs = random_inputs(2)
        call = running.stub.StreamSteps()
        await call.write(
            pb.StreamStepsRequest(
                requests=[step_request("a", inputs, 0, "1", timeout=0.02), step_request("b", inputs, 0, "2")]
            )
        )
        (late,) = (await call.read()).responses
        assert late.request_id == "1"
        assert late.status.code == grpc.StatusCode.DEADLINE_EXCEEDED.value[0]
        assert reason_of(late.status) == "DEADLINE_EXCEEDED"
        running.executor.gate.set()
        await call.done_writing()
        (other,) = (await call.read()).responses
        assert other.position == 2


async def test_a_stream_whose_client_goes_away_leaves_nothing_running():
    async with running_gateway() as running:
        await running.create("a")
        running.executor.hold()
        call = running.stub.StreamSteps()
        await call.write(pb.StreamStepsRequest(requests=[step_request("a", random_inputs(2), 0, "1")]))
        await running.executor.entered.wait()
        call.cancel()
        async with asyncio.timeout(10):
            await running.gateway.engine._admission.idle()
        running.executor.gate.set()
        assert (await running.stub.Step(step_request("a", random_inputs(2), 0))).position == 2


async def test_a_stream_is_not_read_past_the_steps_it_may_have_under_way():
    async with running_gateway(max_stream_steps=3) as running:
        for number in range(8):
            await running.create(f"s{number}")
        running.executor.hold()
        call = running.stub.StreamSteps()
        requests = [step_request(f"s{number}", random_inputs(1), 0, str(number)) for number in range(8)]
        await call.write(pb.StreamStepsRequest(requests=requests))
        await running.executor.entered.wait()
        assert running.gateway.engine._admission.steps <= 3
        running.executor.gate.set()
        await call.done_writing()
        answered = [r.request_id async for m in call for r in m.responses]
        assert sorted(answered) == [str(number) for number in range(8)]
