"""What the gateway costs, beside what it is made of: ``make bench``, or ``python benchmarks/serving.py``.

One run, one machine: the bare executor, a bare gRPC echo, the C++ and NumPy yardsticks, and the gateway under several
loads, its clients on the same cores. The model is an NTM of 128 slots x 20 with an LSTM controller of 100 and random
weights. Prints a table and writes JSON. Figures are for comparing with each other, not with another machine's.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HERE = Path(__file__).resolve().parent
BIN = Path(sys.executable).parent
TICK = os.sysconf("SC_CLK_TCK")

# Name, mode, sessions, time steps a request, more arguments of load.py.
LOADS = (
    ("coalesced, 1 session", "coalesced", 1, 1, ()),
    ("coalesced, 8 sessions", "coalesced", 8, 1, ()),
    ("coalesced, 64 sessions", "coalesced", 64, 1, ()),
    ("coalesced, 256 sessions", "coalesced", 256, 1, ("--groups", "2")),
    ("coalesced, 64 sessions", "coalesced", 64, 16, ()),
    ("coalesced, 256 sessions", "coalesced", 256, 16, ("--groups", "2")),
    ("a stream for each of 64", "stream", 64, 1, ()),
    ("a call for each step of 64", "unary", 64, 1, ()),
    ("stream, 1 session", "stream", 1, 1, ()),
    ("open loop, 1,000 a second", "open", 256, 1, ("--rate", "1000")),
    ("open loop, 3,000 a second", "open", 256, 1, ("--rate", "3000")),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each load (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "serving.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = run(Path(name), options.seconds)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {options.output}")


def run(folder, seconds):
    results = {"machine": machine(), "seconds": seconds}
    print(results["machine"])
    results["numpy_batch_64_one_core"] = float(script("numpy_yardstick", seconds))
    results["cpp_batch_64_two_threads"] = float(script("cpp_yardstick", folder, seconds))
    print(f"NumPy, batch 64, one core    {results['numpy_batch_64_one_core']:10,.0f} steps/s")
    print(f"C++, batch 64, two threads   {results['cpp_batch_64_two_threads']:10,.0f} steps/s")
    script("export", folder / "models")
    results["bare"] = json.loads(script("bare_executor", folder / "models", seconds))
    for case in results["bare"]:
        print(
            "bare executor, batch {batch:3} x {steps:2}  {steps_per_s:10,.0f} steps/s  {ms:7.2f} ms a call".format(
                **case
            )
        )
    with process([sys.executable, str(HERE / "echo_server.py")], folder) as (_, target):
        results["echo"] = load("stream", target, 1, 1, seconds)
    print("bare gRPC echo, 1 stream       p50 {p50_ms:.2f} ms".format(**results["echo"]))
    command = [str(BIN / "ntm-serve"), "--model-dir", str(folder / "models"), "--listen", "127.0.0.1:0", "--port-file"]
    with process(command, folder) as (gateway, target):
        results["gateway"] = loads(gateway, target, seconds)
    with process([*command[:-1], "--max-batch-size", "1", "--port-file"], folder) as (_, target):
        warm_up(target)
        results["batch_1"] = load("coalesced", target, 64, 1, seconds)
    print("the same with --max-batch-size 1, 64 sessions  {steps_per_s:10,.0f} steps/s".format(**results["batch_1"]))
    results["ratios"] = ratios(results)
    print()
    for name, value in results["ratios"].items():
        print(f"{name:76}{value:8.2f}")
    return results


def loads(gateway, target, seconds):
    warm_up(target)
    cases = []
    print(f"\n{'gateway':28}{'steps':>6}{'requests/s':>12}{'steps/s':>10}{'p50':>9}{'p90':>9}{'p99':>9}   CPU, us")
    for name, mode, sessions, steps, more in LOADS:
        before = cpu_seconds(gateway.pid)
        began = time.perf_counter()
        case = load(mode, target, sessions, steps, seconds, *more)
        share = seconds / (time.perf_counter() - began)
        case["gateway_cpu_us_per_request"] = (
            1e6 * (cpu_seconds(gateway.pid) - before) * share / max(1, case["requests"])
        )
        case["name"] = name
        cases.append(case)
        print(
            "{name:28}{steps:6}{requests_per_s:12,.0f}{steps_per_s:10,.0f}{p50_ms:9.2f}{p90_ms:9.2f}{p99_ms:9.2f}"
            "   gateway {gateway_cpu_us_per_request:.0f}, client {client_cpu_us_per_request:.0f}".format(**case)
        )
    return cases


def warm_up(target):
    """Until what the loads need is compiled: the executor compiles the shapes that it is asked for."""
    best = 0.0
    while True:
        case = load("coalesced", target, 256, 16, 3.0, "--groups", "2")
        if case["steps_per_s"] < 1.1 * best:
            break
        best = case["steps_per_s"]
    for sessions in (1, 8, 64):
        load("coalesced", target, sessions, 1, 2.0)


def ratios(results):
    def case(mode, sessions, steps):
        return next(c for c in results["gateway"] if (c["mode"], c["sessions"], c["steps"]) == (mode, sessions, steps))

    best = max(results["bare"], key=lambda c: c["steps_per_s"])
    alone = next(c for c in results["bare"] if (c["batch"], c["steps"]) == (1, 1))
    together = next(c for c in results["bare"] if (c["batch"], c["steps"]) == (64, 16))
    full, one = case("coalesced", 256, 16), case("stream", 1, 1)
    executor_us = best["cpu_us_per_step"] * 16
    return {
        "256 sessions x 16 steps, over the bare executor at its best": full["steps_per_s"] / best["steps_per_s"],
        "its gateway CPU over the executor's": (full["gateway_cpu_us_per_request"] - executor_us) / executor_us,
        "64 sessions x 1 step, over NumPy": case("coalesced", 64, 1)["steps_per_s"]
        / results["numpy_batch_64_one_core"],
        "64 streams x 1 step, over NumPy": case("stream", 64, 1)["steps_per_s"] / results["numpy_batch_64_one_core"],
        "1 session x 1 step, p50 beyond bare call and echo, ms": one["p50_ms"]
        - alone["ms"]
        - results["echo"]["p50_ms"],
        "64 sessions x 1 step, over --max-batch-size 1": case("coalesced", 64, 1)["steps_per_s"]
        / results["batch_1"]["steps_per_s"],
        "bare executor, batch 64 x 16, over C++ on two threads": together["steps_per_s"]
        / results["cpp_batch_64_two_threads"],
    }


def load(mode, target, sessions, steps, seconds, *more):
    command = [sys.executable, str(HERE / "load.py"), mode, target, "--sessions", str(sessions), "--steps", str(steps)]
    done = subprocess.run(
        [*command, "--seconds", str(seconds), *more], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT
    )
    return json.loads(done.stdout)


def script(name, *arguments):
    """Runs one of ``benchmarks/parts.py`` in a process of its own; what it printed last."""
    command = [sys.executable, str(HERE / "parts.py"), name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


@contextmanager
def process(command, folder):
    """A server that writes its port to the file that is its last argument; its process and target."""
    port_file = folder / f"port-{time.monotonic_ns()}"
    with (folder / "server.log").open("ab") as log:
        server = subprocess.Popen([*command, str(port_file)], stdout=log, stderr=log, cwd=ROOT)
    try:
        while not (port_file.exists() and port_file.read_text().strip()):
            if server.poll() is not None:
                raise SystemExit((folder / "server.log").read_text())
            time.sleep(0.05)
        wait_until_serving(target := f"127.0.0.1:{port_file.read_text().strip()}")
        yield server, target
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def wait_until_serving(target):
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    with grpc.insecure_channel(target) as channel:
        try:
            for reply in health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(), timeout=120):
                if reply.status == health_pb2.HealthCheckResponse.SERVING:
                    return
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNIMPLEMENTED:  # the echo has no health
                raise


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICK


def machine():
    model = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), ":?")
    return f"{model.split(':')[1].strip()}, {os.cpu_count()} cores, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
