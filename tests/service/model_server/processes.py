"""Real ntm-model-server processes for tests."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

START_LIMIT = 120.0


@dataclass
class ModelServer:
    """A model server in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)


def start_model_server(model_dir: Path, scratch: Path, *options: str, port: int = 0) -> ModelServer:
    """Starts one; returns once it listens."""
    scratch.mkdir(parents=True, exist_ok=True)
    port_file, log = scratch / "port", scratch / "log"
    port_file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "service.model_server", "--model-dir", str(model_dir)]
    command += ["--listen", f"127.0.0.1:{port}", "--port-file", str(port_file), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("NTM_")}
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    try:
        wait_until(lambda: port_file.exists() or process.poll() is not None, START_LIMIT)
        assert port_file.exists(), f"did not start, exit status {process.wait()}: {log.read_text()}"
        return ModelServer(process, int(port_file.read_text()), log)
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextlib.contextmanager
def running_model_server(model_dir: Path, scratch: Path, *options: str, port: int = 0) -> Iterator[ModelServer]:
    server = start_model_server(model_dir, scratch, *options, port=port)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.kill()


def wait_until(condition, limit: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    """Waits for something that another process does; asks often, fails after ``limit`` seconds."""
    end = time.monotonic() + limit
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"did not happen within {limit} s")
        time.sleep(0.01)
