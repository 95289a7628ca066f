"""The gateway as a process of its own: started, waited for, and ended as an operator would."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

START_LIMIT_S = 120.0
STOP_LIMIT_S = 40.0
_POLL_S = 0.05


class GatewayFailed(Exception):
    """The gateway did not start, or did not end as it should; the text has the end of its log."""


class GatewayProcess:
    """``ntm-serve`` on a free port of loopback, with its log in a file.

    Args:
        model_dir: What it serves.
        run_dir: Where its log and its port file go.
    """

    def __init__(self, model_dir: Path, run_dir: Path) -> None:
        self.log = run_dir / "gateway.log"
        self._port_file = run_dir / "gateway.port"
        self._port_file.unlink(missing_ok=True)
        program = Path(sys.executable).with_name("ntm-serve")
        command = [str(program), "--model-dir", str(model_dir), "--listen", "127.0.0.1:0"]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [*command, "--port-file", str(self._port_file)], stdout=log, stderr=subprocess.STDOUT
            )

    def wait_until_serving(self) -> str:
        """Returns its address once its health says SERVING.

        Raises:
            GatewayFailed: it ended, or took too long.
        """
        deadline = time.monotonic() + START_LIMIT_S
        self._wait(self._port_file.exists, deadline)
        target = f"127.0.0.1:{self._port_file.read_text().strip()}"
        with grpc.insecure_channel(target) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            self._wait(lambda: _is_serving(stub), deadline)
        return target

    def stop(self) -> None:
        """Tells it to end, by SIGTERM, and waits for it.

        Raises:
            GatewayFailed: it did not end, or not with exit code 0.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            raise GatewayFailed(
                f"the gateway did not end within {STOP_LIMIT_S:.0f} s of SIGTERM{self._tail()}"
            ) from None
        if code:
            raise GatewayFailed(f"the gateway ended with exit code {code}{self._tail()}")

    def kill(self) -> None:
        """Ends it at once, if it still runs."""
        self._process.kill()
        self._process.wait()

    def _wait(self, condition: Callable[[], bool], deadline: float) -> None:
        while not condition():
            if self._process.poll() is not None:
                raise GatewayFailed(f"the gateway ended with exit code {self._process.returncode}{self._tail()}")
            if time.monotonic() > deadline:
                raise GatewayFailed(f"the gateway was not SERVING after {START_LIMIT_S:.0f} s{self._tail()}")
            time.sleep(_POLL_S)  # another process has to start, and writes a file when it has

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:]
        return "\n".join([f"; the end of {self.log}:", *(f"  {line}" for line in lines)])


def _is_serving(stub: health_pb2_grpc.HealthStub) -> bool:
    try:
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=2)
    except grpc.RpcError:  # not listening yet
        return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
