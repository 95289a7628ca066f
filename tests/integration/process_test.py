"""The gateway's life as a process: start, refusals to start, drain, signals."""

import json
import signal
import subprocess
import threading

import grpc
import numpy as np
import pytest

from service.client import GatewayError, SequenceClient
from tests.integration import models
from tests.integration.processes import NTM_SERVE, Gateway


def run(*arguments):
    return subprocess.run([NTM_SERVE, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_no_models_no_start(tmp_path):
    ended = run("--model-dir", str(tmp_path), "--listen", "127.0.0.1:0")
    assert ended.returncode == 1
    assert "ntm-serve: " in ended.stderr
    assert str(tmp_path) in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_that_is_taken_is_named(gateway, model_dir):
    ended = run("--model-dir", str(model_dir), "--listen", gateway.target)
    assert ended.returncode == 1
    assert f"cannot listen on {gateway.target}" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_it_tells_where_it_listens_and_what_it_serves(gateway):
    lines = gateway.log.splitlines()
    assert f"listening on {gateway.target}" in lines
    (serving,) = [json.loads(line) for line in lines if '"serving"' in line]
    assert serving["models"] == {kind: [1] for kind in models.KINDS}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_idle_gateway_cleanly_even_with_a_client_that_stays(model_dir, tmp_path, number):
    with Gateway(tmp_path, "--model-dir", str(model_dir)) as gateway, SequenceClient(gateway.target) as client:
        with client.session("lstm") as session:
            session.step(np.zeros((1, models.INPUT_DIM), np.float32))
        gateway.process.send_signal(number)
        assert gateway.process.wait(60) == 0
    assert "Traceback" not in gateway.log


def test_under_load_what_was_taken_is_answered_and_what_is_new_is_refused(model_dir, tmp_path, wholes):
    """Every step that was answered is right; the first that was not, the client tried again until its time was up."""
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(4, 4000, models.INPUT_DIM)).astype(np.float32)
    answered = [[] for _ in inputs]
    ends = [None] * len(inputs)
    under_way = threading.Barrier(len(inputs) + 1)

    def keep_stepping(index, client):
        session = client.create_session("ntm-dense")
        for begin in range(0, 4000, 5):
            if begin == 50:
                under_way.wait(60)
            try:
                answered[index].append(session.step(inputs[index, begin : begin + 5], timeout=5))
            except GatewayError as error:
                ends[index] = error
                return

    with Gateway(tmp_path, "--model-dir", str(model_dir)) as gateway:
        clients = [SequenceClient(gateway.target) for _ in inputs]
        threads = [threading.Thread(target=keep_stepping, args=pair) for pair in enumerate(clients)]
        for thread in threads:
            thread.start()
        under_way.wait(60)
        assert gateway.terminate() == 0
        for thread in threads:
            thread.join(60)
        for client in clients:
            client.close()
        assert "Traceback" not in gateway.log
    for index, parts in enumerate(answered):
        came = np.concatenate(parts)
        assert len(came) >= 50
        expected = wholes["ntm-dense"](inputs[index : index + 1, : len(came)])[0]
        assert np.abs(came - expected).max() <= wholes["ntm-dense"].tolerance()
        assert ends[index].code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
