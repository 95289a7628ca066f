import hashlib
import io
import json
import logging
import sys

import grpc
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.logs import RequestLog, configure_logging
from tests.service.support import NumpyExecutor, random_inputs, running_gateway, step_request


@pytest.fixture
def log(monkeypatch):
    """What the gateway writes at level debug, as programs get it."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    configure_logging("debug", "json")
    yield written
    root.handlers = before[0]
    root.setLevel(before[1])


def requests_of(log):
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    return [line for line in lines if line["event"] == "request"]


async def test_each_request_leaves_one_line_of_json(log):
    async with running_gateway() as running:
        await running.create("a")
        await running.stub.Step(step_request("a", random_inputs(3), 0))
        steps = [step_request("a", random_inputs(2), 3), step_request("a", random_inputs(2), 99)]
        await running.stub.BatchStep(pb.BatchStepRequest(requests=steps))
        with pytest.raises(grpc.RpcError):
            await running.stub.Step(step_request("b", random_inputs(1), 0))
    lines = requests_of(log)
    assert [(line["rpc"], line["code"], line.get("reason")) for line in lines] == [
        ("CreateSession", "OK", None),
        ("Step", "OK", None),
        ("step", "OK", None),
        ("step", "ABORTED", "POSITION_MISMATCH"),
        ("BatchStep", "OK", None),
        ("Step", "NOT_FOUND", "SESSION_NOT_FOUND"),
    ]
    assert all(line["level"] == "debug" and line["ms"] >= 0 and line["timestamp"] for line in lines)
    assert lines[1]["caller"] == "anonymous"
    assert lines[1]["session"] == lines[2]["session"] == hashlib.sha256(b"a").hexdigest()[:12]


async def test_no_line_holds_a_token_a_session_id_inputs_or_a_clients_text(log, tmp_path):
    token, inputs = "secret-of-alice", random_inputs(1)
    tokens = tmp_path / "tokens.toml"
    tokens.write_text(f'[alice]\ntokens_sha256 = ["{hashlib.sha256(token.encode()).hexdigest()}"]\n')
    metadata = (("authorization", f"Bearer {token}"),)
    executor = NumpyExecutor()
    async with running_gateway(executor, token_file=tokens) as running:
        create = pb.CreateSessionRequest(session_id="the-session", model=pb.ModelSpec(name="sums"))
        await running.stub.CreateSession(create, metadata=metadata)
        await running.stub.Step(step_request("the-session", inputs, 0), metadata=metadata)
        for bad in ("the-session", "not an id: secret-of-bob"):
            with pytest.raises(grpc.RpcError):
                await running.stub.Step(step_request(bad, inputs, 7), metadata=metadata)
        with pytest.raises(grpc.RpcError):
            await running.create("the-session", "secret-model")
    text = log.getvalue()
    assert requests_of(log)[1]["caller"] == "alice"
    for word in (token, "the-session", "secret-of-bob", "secret-model", str(inputs[0, 0]), repr(inputs.tobytes())):
        assert word not in text


async def test_a_share_of_them_or_none_is_enough_where_it_is_so_set(log):
    async with running_gateway(log_sample=0) as running:
        await running.create("a")
    assert requests_of(log) == []


def test_a_line_is_written_where_the_draw_is_below_the_share(log):
    draws = iter((0.05, 0.1, 0.9))
    requests = RequestLog(0.1, draw=lambda: next(draws))
    assert [requests.wanted() for _ in range(3)] == [True, False, False]


def test_nothing_is_drawn_where_debug_is_not_logged(caplog):
    caplog.set_level(logging.INFO)
    assert not RequestLog(0.5, draw=lambda: pytest.fail("drawn")).wanted()
