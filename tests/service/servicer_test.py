"""The public API over a real socket: what works, and how each thing that can be wrong is answered."""

import asyncio

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status.rpc_status import from_call

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.status import status_of
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

MIB = 1024 * 1024


def reason_of(status):
    info = error_details_pb2.ErrorInfo()
    (found,) = [detail for detail in status.details if detail.Is(info.DESCRIPTOR)]
    found.Unpack(info)
    assert info.domain == "ntm-serving"
    return info.reason


async def refused(call):
    """The code, reason and rich status that a call is refused with."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    status = from_call(caught.value)
    return caught.value.code(), reason_of(status), status


async def stream(running, *messages):
    """Sends messages on a stream of its own; the responses by request id."""

    async def send():
        for message in messages:
            yield message

    return {r.request_id: r async for m in running.stub.StreamSteps(send()) for r in m.responses}


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


def wrong(**changes):
    request = step_request("s", random_inputs(2, seed=5), 3)
    for name, value in changes.items():
        target = request if hasattr(request, name) and name != "shape" else request.inputs
        if name == "shape":
            del target.shape[:]
            target.shape.extend(value)
        else:
            setattr(target, name, value)
    return request


NAN = np.array([[0, np.nan]], np.float32).tobytes()
BAD_STEPS = {
    "unknown session": (wrong(session_id="nobody"), "NOT_FOUND", "SESSION_NOT_FOUND", None),
    "bad session id": (wrong(session_id="no/body"), "INVALID_ARGUMENT", "INVALID_ID", "session_id"),
    "wrong last dimension": (
        wrong(shape=(1, 3), content=b"\0" * 12),
        "INVALID_ARGUMENT",
        "INVALID_TENSOR",
        "inputs.shape",
    ),
    "wrong dtype": (wrong(dtype=0), "INVALID_ARGUMENT", "INVALID_TENSOR", "inputs.dtype"),
    "unknown dtype": (wrong(dtype=17), "INVALID_ARGUMENT", "INVALID_TENSOR", "inputs.dtype"),
    "short bytes": (wrong(content=b"\0" * 15), "INVALID_ARGUMENT", "INVALID_TENSOR", "inputs.content"),
    "NaN": (wrong(shape=(1, 2), content=NAN), "INVALID_ARGUMENT", "INVALID_TENSOR", "inputs.content"),
    "empty chunk": (wrong(shape=(0, 2), content=b""), "INVALID_ARGUMENT", "INVALID_TENSOR", "inputs.shape"),
    "no inputs": (pb.StepRequest(session_id="s"), "INVALID_ARGUMENT", "INVALID_TENSOR", "inputs.dtype"),
    "negative position": (wrong(position=-1), "INVALID_ARGUMENT", "INVALID_ARGUMENT", "position"),
    "position elsewhere": (wrong(position=99), "ABORTED", "POSITION_MISMATCH", None),
    "other inputs": (wrong(position=0), "ABORTED", "STEP_CONFLICT", None),
    "large chunk": (
        step_request("s", np.zeros((MIB // 8 + 1, 2), np.float32), 3),
        "RESOURCE_EXHAUSTED",
        "MESSAGE_TOO_LARGE",
        None,
    ),
}


@pytest.mark.parametrize("name", BAD_STEPS)
async def test_a_bad_step_gets_its_status_and_the_session_steps_on(name):
    request, code, reason, field = BAD_STEPS[name]
    async with running_gateway(max_chunk_mib=1) as running:
        await running.create("s")
        inputs = random_inputs(6)
        await running.stub.Step(step_request("s", inputs[:3], 0))
        came, came_reason, status = await refused(running.stub.Step(request))
        assert (came.name, came_reason) == (code, reason)
        bad = error_details_pb2.BadRequest()
        fields = [
            violation.field for detail in status.details if detail.Unpack(bad) for violation in bad.field_violations
        ]
        assert fields == ([field] if field else [])
        assert not any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)

        among_others = await stream(running, pb.StreamStepsRequest(requests=[request]))
        assert next(iter(among_others.values())).status == status

        reply = await running.stub.Step(step_request("s", inputs[3:], 3))
        np.testing.assert_array_equal(outputs_of(reply), run_whole(inputs)[0][3:])


@pytest.mark.parametrize(
    ("request_", "code", "reason"),
    [
        (pb.CreateSessionRequest(session_id="x", model=pb.ModelSpec(name="nope")), "NOT_FOUND", "MODEL_NOT_FOUND"),
        (
            pb.CreateSessionRequest(session_id="x", model=pb.ModelSpec(name="sums", version=9)),
            "NOT_FOUND",
            "MODEL_NOT_FOUND",
        ),
        (pb.CreateSessionRequest(session_id="x", model=pb.ModelSpec(name="../x")), "INVALID_ARGUMENT", "INVALID_ID"),
        (pb.CreateSessionRequest(session_id="", model=pb.ModelSpec(name="sums")), "INVALID_ARGUMENT", "INVALID_ID"),
        (
            pb.CreateSessionRequest(session_id="x", model=pb.ModelSpec(name="sums"), ttl={"seconds": 10**9}),
            "INVALID_ARGUMENT",
            "INVALID_ARGUMENT",
        ),
        (
            pb.CreateSessionRequest(session_id="s", model=pb.ModelSpec(name="sums"), ttl={"seconds": 5}),
            "ALREADY_EXISTS",
            "SESSION_EXISTS",
        ),
    ],
)
async def test_a_bad_create_gets_its_status(request_, code, reason):
    async with running_gateway() as running:
        await running.create("s")
        came, came_reason, _ = await refused(running.stub.CreateSession(request_))
        assert (came.name, came_reason) == (code, reason)


async def test_limits_say_when_to_come_back():
    async with running_gateway(max_queued_steps=1) as running:
        for name in "ab":
            await running.create(name)
        running.executor.hold()
        first = asyncio.ensure_future(running.stub.Step(step_request("a", random_inputs(1), 0)))
        await running.executor.entered.wait()
        code, reason, status = await refused(running.stub.Step(step_request("b", random_inputs(1), 0)))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED")
        assert any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
        running.executor.gate.set()
        await first


@pytest.mark.parametrize("method", ["Step", "BatchStep", "StreamSteps"])
async def test_a_message_over_the_limit_is_named_and_the_rest_goes_on(method):
    async with running_gateway(max_message_mib=1, max_chunk_mib=4) as running:
        await running.create("s")
        large = step_request("s", np.zeros((MIB // 8 + 1, 2), np.float32), 0, "large")
        if method == "StreamSteps":
            responses = await stream(
                running,
                pb.StreamStepsRequest(requests=[large]),
                pb.StreamStepsRequest(requests=[step_request("s", random_inputs(1), 0, "small")]),
            )
            status = responses["large"].status
            assert (status.code, reason_of(status)) == (8, "MESSAGE_TOO_LARGE")
            assert responses["small"].position == 1
            return
        request = large if method == "Step" else pb.BatchStepRequest(requests=[large])
        code, reason, status = await refused(getattr(running.stub, method)(request))
        assert (code, reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
        assert not any(detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR) for detail in status.details)
        assert (await running.stub.Step(step_request("s", random_inputs(1), 0))).position == 1


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


async def test_a_bug_in_the_gateway_is_internal_and_ends_nothing_else(caplog):
    async with running_gateway() as running:
        await running.create("s")
        load = running.gateway.engine._store.load

        async def broken(key, *, fresh=False):
            if key.session_id == "s":
                raise RuntimeError("a secret")
            return await load(key, fresh=fresh)

        running.gateway.engine._store.load = broken
        running.gateway.engine._store.load_now = None  # nor can it be had another way
        await running.create("t")
        responses = await stream(
            running,
            pb.StreamStepsRequest(requests=[step_request(name, random_inputs(1), 0, name) for name in ("s", "t")]),
        )
        assert responses["s"].status == status_of(RuntimeError("a secret"))
        assert "secret" not in str(responses["s"])
        assert responses["t"].position == 1
        code, reason, _ = await refused(running.stub.GetSession(pb.GetSessionRequest(session_id="s")))
        assert (code, reason) == (grpc.StatusCode.INTERNAL, "INTERNAL")
        assert "a secret" in caplog.text  # the operator does see it


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
