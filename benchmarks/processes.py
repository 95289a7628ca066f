"""The processes that benchmarks measure: servers on free ports of loopback, and what they take."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TICK = os.sysconf("SC_CLK_TCK")
MIB = 1024 * 1024


class Server:
    """A server that writes its port to ``--port-file``.

    Args:
        command: The command without address and port file.
        folder: Where its log and port file go.
    """

    def __init__(self, command, folder):
        self.log = folder / "server.log"
        self._port_file = folder / f"port-{time.monotonic_ns()}"
        # What it prints and logs goes to a file; neither is looked at while something is measured.
        with self.log.open("ab") as log:
            arguments = ["--listen", "127.0.0.1:0", "--port-file", str(self._port_file)]
            self.process = subprocess.Popen([*map(str, command), *arguments], stdout=log, stderr=log, cwd=ROOT)

    @property
    def target(self):
        return f"127.0.0.1:{self._port_file.read_text().strip()}"

    def wait_port(self, every=0.005):
        while not (self._port_file.exists() and self._port_file.read_text().strip()):
            if self.process.poll() is not None:
                raise SystemExit(self.log.read_text())
            time.sleep(every)  # the file is another process' to write

    def wait_serving(self):
        """Waits for grpc.health.v1 to say SERVING."""
        self.wait_port()
        with grpc.insecure_channel(self.target) as channel:
            for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=300):
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        raise SystemExit(self.log.read_text())

    def wait_idle(self, seconds=3.0):
        """Waits until it has used next to no CPU for so long: what it compiles in the background is compiled."""
        while True:
            before = self.cpu_seconds()
            time.sleep(seconds)  # what is measured is this time
            if self.cpu_seconds() - before < 0.05 * seconds:
                return

    def cpu_seconds(self):
        return cpu_seconds(self.process.pid)

    def resident_bytes(self):
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"the server ended:\n{self.log.read_text()}")

    def stop(self):
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def cpu_seconds(pid):
    """CPU seconds of a process, all of its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def stolen(since=None):
    """The share of the cores' time that the host has given to others since an earlier call; and what the next takes.

    See "steal" in proc_stat(5): 0 on a machine that is nobody's guest. What was taken away shows in all that was
    measured meanwhile.
    """
    ticks = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    now = ticks[7], sum(ticks)
    took, passed = (0, 0) if since is None else (now[0] - since[0], now[1] - since[1])
    return took / max(1, passed), now


def cpu_of(server=None, store=None):
    """CPU seconds of a gateway's own threads, of those that run its models, and of a store beside it, by process id."""
    spent = {}
    if server is not None:
        spent = {"gateway": 0.0, "executor": 0.0}
        for task in Path(f"/proc/{server}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
                part = "executor" if (task / "comm").read_text().startswith(("runner", "tf_")) else "gateway"
                spent[part] += int((task / "schedstat").read_text().split()[0]) / 1e9
    return spent if store is None else {**spent, "store": cpu_seconds(store)}


@contextmanager
def gateway(folder, *options):
    """``ntm-serve`` with these options, SERVING."""
    with server([BIN / "ntm-serve", *options], folder) as started:
        started.wait_serving()
        yield started


@contextmanager
def model_server(folder, model_dir, *options):
    """``ntm-model-server``; its port opens once the models are loaded."""
    with server([BIN / "ntm-model-server", "--model-dir", model_dir, *options], folder) as started:
        started.wait_port()
        yield started


@contextmanager
def server(command, folder):
    """Any server that takes ``--listen`` and ``--port-file``; ended at the end."""
    folder.mkdir(parents=True, exist_ok=True)
    started = Server(command, folder)
    try:
        yield started
    finally:
        if started.process.poll() is None:
            started.stop()


def export_copy_model(directory):
    """The NTM of the copy task, 128 slots x 20 with a dense controller of 100, untrained: as ``copy``, version 1."""
    if (Path(directory) / "copy" / "1").is_dir():
        return
    script = (
        "import sys, keras\n"
        "from ntm import NeuralTuringMachine\n"
        "from training.export import export_model\n"
        "keras.utils.set_random_seed(0)\n"
        "layer = NeuralTuringMachine(8, n_slots=128, m_depth=20, controller_units=100, return_sequences=True)\n"
        "export_model(keras.Sequential([keras.Input((None, 10)), layer]), sys.argv[1], name='copy', task='copy')\n"
    )
    environment = {"TF_ENABLE_ONEDNN_OPTS": "0", **os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    subprocess.run([sys.executable, "-c", script, str(directory)], check=True, cwd=ROOT, env=environment)
