"""The public API over a real socket: what works."""

import asyncio
from types import SimpleNamespace

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.alike import parse_requests
from service.errors import DeadlineExceeded
from service.limits import Limits
from service.logs import RequestLog
from service.observing import SILENT
from service.stepping import Stepping
from tests.service.bad_requests_test import MIB
from tests.service.benches import Bench
from tests.service.refusals import reason_of, refused
from tests.service.support import (
    NumpyExecutor,
    initial_state,
    outputs_of,
    random_inputs,
    run_whole,
    running_gateway,
    step_request,
    version_of,
)


async def test_a_session_from_create_to_delete():
    async with running_gateway() as running:
        session = await running.create("s")
        assert (session.session_id, session.model.name, session.model.version) == ("s", "sums", 1)
        assert (session.position, session.fingerprint) == (0, "f1")
        assert session.expire_time.seconds - session.create_time.seconds == 3600
        inputs = random_inputs(9)
        first = await running.stub.Step(step_request("s", inputs[:4], 0, "r1"))
        assert (first.request_id, first.session_id, first.position) == ("r1", "s", 4)
        assert not first.HasField("status")
        second = await running.stub.Step(step_request("s", inputs[4:], 4))
        outputs = np.concatenate([outputs_of(first), outputs_of(second)])
        np.testing.assert_array_equal(outputs, run_whole(inputs)[0])
        assert (await running.stub.GetSession(pb.GetSessionRequest(session_id="s"))).position == 9
        for _ in range(2):
            await running.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        code, reason, _ = await refused(running.stub.GetSession(pb.GetSessionRequest(session_id="s")))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")


async def test_inspect_gives_the_state_by_name():
    async with running_gateway() as running:
        await running.create("s")
        fresh = await running.stub.InspectSession(pb.InspectSessionRequest(session_id="s"))
        parts = {part.name: np.frombuffer(part.value.content, np.float32) for part in fresh.state}
        np.testing.assert_array_equal(np.concatenate(list(parts.values())), initial_state())
        assert [tuple(part.value.shape) for part in fresh.state] == [(2,), (1,), (1, 2)]


async def test_batch_step_answers_in_order_and_each_for_itself():
    async with running_gateway() as running:
        for name in "abc":
            await running.create(name)
        inputs = random_inputs(3)
        requests = [step_request(name, inputs, 0, name) for name in ("a", "nobody", "b", "c")]
        reply = await running.stub.BatchStep(pb.BatchStepRequest(requests=requests))
        assert [r.request_id for r in reply.responses] == ["a", "nobody", "b", "c"]
        assert reason_of(reply.responses[1].status) == "SESSION_NOT_FOUND"
        for index in (0, 2, 3):
            np.testing.assert_array_equal(outputs_of(reply.responses[index]), run_whole(inputs)[0])


async def test_a_batch_step_of_thousands_of_steps_is_under_way_in_parts_and_answered_in_order():
    executor, inputs = NumpyExecutor(), random_inputs(2000)
    executor.hold()
    async with running_gateway(executor) as running:
        await running.create("s")
        requests = [step_request("s", inputs[at : at + 1], None, str(at)) for at in range(2000)]
        reply = asyncio.ensure_future(running.stub.BatchStep(pb.BatchStepRequest(requests=requests)))
        await executor.entered.wait()
        assert 1 < running.gateway.engine._admission.steps <= 1000
        executor.gate.set()
        responses = (await reply).responses
        assert [r.request_id for r in responses] == [str(at) for at in range(2000)]
        np.testing.assert_array_equal(np.concatenate([outputs_of(r) for r in responses]), run_whole(inputs)[0])


async def test_responses_pass_a_client_with_grpc_s_default_limit():
    async with running_gateway() as running:
        channel = grpc.aio.insecure_channel(running.target)
        stub = type(running.stub)(channel)
        steps = MIB // 16
        for number in range(12):
            await running.create(f"s{number}")
        requests = [
            step_request(f"s{number}", np.zeros((steps, 2), np.float32), 0, str(number)) for number in range(12)
        ]

        async def send():
            for request in requests:
                yield pb.StreamStepsRequest(requests=[request])

        answered = [r.position async for m in stub.StreamSteps(send()) for r in m.responses]
        assert answered == [steps] * 12
        await channel.close()


async def test_models_are_listed_with_their_versions_and_sessions():
    executor = NumpyExecutor(version_of("b", 1), version_of("a", 1), version_of("b", 10), version_of("b", 9))
    async with running_gateway(executor) as running:
        await running.create("s", "b")
        listed = (await running.models.ListModels(model_pb.ListModelsRequest())).models
        assert [(model.name, [v.version for v in model.versions]) for model in listed] == [
            ("a", [1]),
            ("b", [10, 9, 1]),
        ]
        model = await running.models.GetModel(model_pb.GetModelRequest(name="b"))
        assert [version.session_count for version in model.versions] == [1, 0, 0]
        newest = model.versions[0]
        assert (newest.input_dim, newest.output_dim, newest.state_size) == (2, 3, 5)
        assert newest.state == model_pb.ModelVersion.STATE_AVAILABLE
        assert [(part.name, list(part.shape), part.offset) for part in newest.state_layout] == [
            ("average", [2], 0),
            ("alternating", [1], 2),
            ("counters", [1, 2], 3),
        ]
        code, reason, _ = await refused(running.models.GetModel(model_pb.GetModelRequest(name="c")))
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "MODEL_NOT_FOUND")


async def test_health_and_reflection():
    async with running_gateway() as running:
        health = health_pb2_grpc.HealthStub(running.channel)
        for name in ("", "ntm_serving.v1.SequenceService", "ntm_serving.v1.ModelService"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
        reflected = reflection_pb2_grpc.ServerReflectionStub(running.channel)

        async def ask():
            yield reflection_pb2.ServerReflectionRequest(list_services="")

        async for reply in reflected.ServerReflectionInfo(ask()):
            names = {service.name for service in reply.list_services_response.service}
        assert names == {
            "ntm_serving.v1.SequenceService",
            "ntm_serving.v1.ModelService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }


async def test_draining_finishes_what_is_under_way_refuses_what_is_new_and_ends_streams():
    async with running_gateway() as running:
        for name in "ab":
            await running.create(name)
        running.executor.hold()
        call = running.stub.StreamSteps()
        await call.write(pb.StreamStepsRequest(requests=[step_request("a", random_inputs(2), 0, "1")]))
        await running.executor.entered.wait()
        draining = asyncio.create_task(running.gateway.drain())
        health = health_pb2_grpc.HealthStub(running.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        async for state in watch:
            if state.status == health_pb2.HealthCheckResponse.NOT_SERVING:
                break
        watch.cancel()
        await call.write(pb.StreamStepsRequest(requests=[step_request("b", random_inputs(1), 0, "2")]))
        (refusal,) = (await call.read()).responses
        assert (refusal.request_id, refusal.status.code) == ("2", grpc.StatusCode.UNAVAILABLE.value[0])
        assert reason_of(refusal.status) == "DRAINING"
        running.executor.gate.set()
        (finished,) = (await call.read()).responses
        assert (finished.request_id, finished.position) == ("1", 2)
        code, reason, _ = await refused(call.read())
        assert (code, reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
        assert await draining
        assert running.executor.closed


async def test_refusals_of_a_whole_message_at_once_fit_messages_of_a_limited_size():
    """As where thousands of steps run into their time limit together."""
    requests = [step_request(f"s{number}", random_inputs(1), 0) for number in range(3000)]
    (alike,), _ = parse_requests(requests, 1 << 20)
    limits = Limits(
        max_chunk_bytes=1 << 20, max_stream_steps=5000, step_timeout=1.0, session_ttl=1.0, max_session_ttl=1.0
    )
    answers, errors = [], [DeadlineExceeded("late " * 200)] * len(requests)
    async with Bench() as bench:
        stepping = Stepping(bench.engine, limits, SILENT, RequestLog(0.0))
        steps = SimpleNamespace(began=0.0)
        stepping._ended(alike, lambda _, some, others: answers.extend(some), steps, range(len(requests)), errors)
    assert sum(answer.steps for answer in answers) == len(requests)
    assert sum(len(answer.data) for answer in answers) > 2 * 1024 * 1024
    assert max(len(answer.data) for answer in answers) < 1024 * 1024
