"""The process: what it offers by default, how it drains, and how it ends while it still waits for a model."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.service.model_server import recordings
from tests.service.model_server.processes import running_model_server, wait_until
from tests.service.model_server.recordings import Row, call
from tests.service.model_server.replay_test import config_file, copy_models


def _row(file: str, case: str) -> Row:
    return next(row for row in recordings.rows(file) if row.case == case)


def test_reload_is_off_health_is_on_and_sigterm_drains(tmp_path: Path) -> None:
    models = copy_models(tmp_path / "models")
    with (
        running_model_server(models, tmp_path, "--enable-grpc-healthcheck-service") as server,
        grpc.insecure_channel(server.address) as channel,
        ThreadPoolExecutor(4) as threads,
    ):
        reply = call(channel, _row("b_lifecycle", "reload_same_config"), models)
        assert (reply.code, reply.message) == (
            "PERMISSION_DENIED",
            "reloading is off: start the server with --allow-reload",
        )
        health = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        slow = _row("g_inflight_and_lifecycle", "slow_alone")
        assert call(channel, slow, models).code == "OK"
        flying = [threads.submit(call, channel, slow, models) for _ in range(3)]
        busy = _row("g_inflight_and_lifecycle", "slow_alone")
        wait_until(lambda: call(channel, busy, models, timeout=0.02).code == "DEADLINE_EXCEEDED")
        server.process.send_signal(signal.SIGTERM)
        assert [flight.result().code for flight in flying] == ["OK"] * 3
        assert server.process.wait(30) == 0
        assert b"Traceback" not in server.log.read_bytes()


def test_sigterm_while_a_model_is_waited_for(tmp_path: Path) -> None:
    models = copy_models(tmp_path / "models")
    config = config_file(tmp_path, models, "nodir", "misc")
    command = [sys.executable, "-m", "service.model_server", "--model-dir", str(models), "--listen", "127.0.0.1:0"]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen([*command, "--model-config-file", str(config)], stderr=output)
    try:
        wait_until(lambda: b"loaded {name: misc version: 1}" in log.read_bytes(), 60)
        assert b"listening" not in log.read_bytes()
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert b"Traceback" not in log.read_bytes()
    finally:
        process.kill()
        process.wait()
