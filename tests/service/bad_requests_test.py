"""How each thing that can be wrong with a request is answered."""

import asyncio

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.status import status_of
from tests.service.refusals import reason_of, refused, stream
from tests.service.support import outputs_of, random_inputs, run_whole, running_gateway, step_request

MIB = 1024 * 1024


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
