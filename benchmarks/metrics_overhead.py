"""What the gateway's metrics cost: CPU-seconds of its process for each step, with them and without.

Two gateways run side by side, alike but for ``--metrics-listen``, and take turns of a tenth of a second at the same
load, in the order ABBA, so that whatever else the machine does meets both. Each round starts a fresh pair; its ratio is
the median of those of its fours, and what counts is the median of the rounds. The one with metrics is scraped every few
seconds, which counts.

Two executors: ``idle`` computes nothing, so that all that is left is the gateway and the metrics weigh the most;
``embedded`` steps an NTM of 128 slots x 20 with an LSTM controller of 100.

    python benchmarks/metrics_overhead.py [--rounds 7] [--sessions 64] [--json FILE]
"""

import argparse
import asyncio
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.client import SequenceClient

ROOT = Path(__file__).resolve().parents[1]
INPUT_DIM = 10
TURNS = "ABBA"  # A without metrics, B with them
TURN_S = 0.1
SCRAPE_EVERY = 10  # of these four


def main():
    options = parse_options()
    results = {}
    with tempfile.TemporaryDirectory(prefix="metrics-overhead-") as name:
        folder = Path(name)
        if "embedded" in options.executors:
            export(folder / "models")
        for executor in options.executors:
            results[executor] = [measure(options, folder, executor) for _ in range(options.rounds)]
            report(executor, results[executor])
    if options.json:
        settings = {key: value for key, value in vars(options).items() if key not in ("json", "serve_idle")}
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps({**settings, "cpus": os.cpu_count(), "rounds": results}, indent=1) + "\n")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sessions", type=int, default=64, help="steps of a message")
    parser.add_argument("--seconds", type=float, default=10.0, help="of each round, about")
    parser.add_argument("--executors", nargs="+", choices=["idle", "embedded"], default=["idle", "embedded"])
    parser.add_argument("--json", type=Path, help="writes what was measured")
    parser.add_argument("--serve-idle", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_idle is not None:
        sys.exit(serve_idle(options.serve_idle))
    return options


def report(executor, rounds):
    without = statistics.median(us for us, _ in rounds)
    shares = sorted(100 * (ratio - 1) for _, ratio in rounds)
    print(
        f"{executor:9} {without:7.2f} us of CPU a step without metrics, {statistics.median(shares):+.1f} % with them"
        f" (median of {len(shares)}; {shares[0]:+.1f} to {shares[-1]:+.1f})",
        flush=True,
    )


def measure(options, folder, executor):
    """A fresh pair of gateways: CPU microseconds a step without metrics, and its ratio with them."""
    with ExitStack() as stack:
        arms = {}
        for arm in "AB":
            process, target, metrics = stack.enter_context(gateway(folder, executor, metrics=arm == "B"))
            client = stack.enter_context(SequenceClient(target))
            sessions = [client.create_session("ntm") for _ in range(options.sessions)]
            arms[arm] = (process, client, [(session, np.zeros((1, INPUT_DIM), np.float32)) for session in sessions])
            if metrics:
                scrape_url = metrics
        messages = min(warm_up(client, work) for _, client, work in arms.values())
        fours, scraping = [], 0.0
        for number in range(max(1, round(options.seconds / TURN_S / len(TURNS)))):
            fours.append(dict.fromkeys("AB", 0.0))
            for arm in TURNS:
                process, client, work = arms[arm]
                before = cpu_seconds(process.pid)
                for _ in range(messages):
                    client.step_many(work, timeout=60)
                fours[-1][arm] += cpu_seconds(process.pid) - before
            if number % SCRAPE_EVERY == 0:
                before = cpu_seconds(arms["B"][0].pid)
                urllib.request.urlopen(scrape_url, timeout=10).read()
                scraping += cpu_seconds(arms["B"][0].pid) - before
        without = sum(four["A"] for four in fours)
        ratio = statistics.median(four["B"] / four["A"] for four in fours) + scraping / without
        return 1e6 * without / (len(fours) * messages * options.sessions * len(TURNS) / 2), ratio


def warm_up(client, work):
    """How many messages a turn takes, once all is warm."""
    messages, end = 0, time.perf_counter() + 20 * TURN_S
    while time.perf_counter() < end:
        client.step_many(work, timeout=60)
        messages += 1
    return max(1, messages // 20)


@contextmanager
def gateway(folder, executor, *, metrics):
    """A gateway: its process, its target and where it is scraped."""
    log = folder / f"{executor}-{metrics}.log"
    arguments = ["--model-dir", str(folder / "models"), "--listen", "127.0.0.1:0", "--log-level", "warning"]
    arguments += ["--metrics-listen", "127.0.0.1:0"] if metrics else []
    (folder / "models").mkdir(exist_ok=True)
    program = ["-m", "service", "--no-xla"] if executor == "embedded" else [__file__, "--serve-idle"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *program, *arguments], cwd=ROOT, env=environment(), stdout=output, stderr=output
        )
    try:
        target = told(process, log, r"listening on (\S+)")
        wait_until_serving(target)
        yield process, target, told(process, log, r"metrics on (\S+)") if metrics else None
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def wait_until_serving(target):
    with grpc.insecure_channel(target) as channel:
        for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120):
            if reply.status == health_pb2.HealthCheckResponse.SERVING:
                return


def told(process, log, pattern):
    """What the gateway said of itself."""
    while (found := re.search(pattern, log.read_text())) is None:
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.02)  # another process has to start and say so
    return found[1]


def environment():
    # One seed of Python's hashes for all, so that no dictionary is laid out better than another.
    paths = f"{ROOT}{os.pathsep}{ROOT / 'protos'}"
    return {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "0", "TF_CPP_MIN_LOG_LEVEL": "3"}


def cpu_seconds(pid):
    """Of all threads of a process, to the nanosecond: Linux's clock of another process (clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


def export(models):
    done = subprocess.run(
        [sys.executable, "benchmarks/parts.py", "export", str(models)],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)


class IdleExecutor:
    """Answers zeros, and the states as they came."""

    max_in_flight = 1
    max_rows = None

    def __init__(self):
        from service.types import ModelVersion, VersionKey

        key = VersionKey("ntm", 1)
        self._versions = {key: ModelVersion(key, "idle", INPUT_DIM, 8, 3000, ())}

    async def start(self):
        pass

    def versions(self):
        return self._versions

    def newest(self, model):
        return next(iter(self._versions))

    def statuses(self):
        return {}

    async def release(self, key):
        pass

    def bucket(self, rows, steps):
        return rows, steps

    async def step(self, key, batch):
        from service.types import StepBatchResult

        return StepBatchResult(np.zeros((*batch.inputs.shape[:2], 8), np.float32), batch.state)

    async def close(self):
        pass


def serve_idle(arguments):
    import uvloop

    from service.config import read_settings
    from service.logs import configure_logging
    from service.server import serve_with
    from service.sessions.memory import MemoryStore

    settings = read_settings(arguments)
    configure_logging(settings.log_level, settings.log_format)

    async def run():
        return await serve_with(
            settings, executor=IdleExecutor(), store=MemoryStore(max_sessions=10_000, clock=time.time)
        )

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


if __name__ == "__main__":
    main()
