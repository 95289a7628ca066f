"""``ntm-serve`` as a user runs it: a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

NTM_SERVE = str(Path(sys.executable).with_name("ntm-serve"))


class Gateway:
    """One ``ntm-serve`` on a free port of loopback, SERVING once ``__enter__`` returns."""

    def __init__(
        self, folder: Path, *arguments: str, listen: str = "127.0.0.1:0", program: tuple[str, ...] = (NTM_SERVE,)
    ) -> None:
        self._port_file = folder / "gateway.port"
        self._log = folder / "gateway.log"
        self._command = [
            *(*program, "--listen", listen, "--port-file", str(self._port_file), "--log-format", "json"),
            *arguments,
        ]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._port_file.unlink(missing_ok=True)
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)

    def wait_until_serving(self) -> None:
        while not self._port_file.exists():
            self._check_alive()
            time.sleep(0.01)
        with grpc.insecure_channel(self.target) as channel:
            for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120):
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        raise AssertionError(f"not serving:\n{self.log}")

    @property
    def target(self) -> str:
        return f"127.0.0.1:{int(self._port_file.read_text())}"

    @property
    def log(self) -> str:
        return self._log.read_text()

    def terminate(self) -> int:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(60)

    def _check_alive(self) -> None:
        assert self.process is not None
        assert self.process.poll() is None, f"the gateway ended at start:\n{self.log}"

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_until_serving()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()
