"""What the gateway costs, beside what it is made of: ``make bench``, or ``python benchmarks/serving.py``.

One run, one machine: the bare executor over batch sizes, with XLA and without, a bare gRPC echo, the C++ and NumPy
yardsticks, and the gateway under closed and open loops, its clients on the same cores. What makes up a ratio is
measured in turns, and the ratio is the median of those of the turns. The model is an NTM of 128 slots x 20 with an LSTM
controller of 100 and random weights. Prints a table, the ratios that the project holds itself to, and writes JSON, of
which ``report.py`` makes the README's table. Figures are for comparing with each other, not with another machine's.
"""

import argparse
import datetime as dt
import functools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import processes
import ratios
from processes import ROOT

HERE = Path(__file__).resolve().parent
ONE_CORE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SESSIONS = (1, 8, 64, 256)
RATES = (1000, 3000, 6000, 10_000)
# Threads, or tasks, of a coalescing client: one makes its message while the others' steps run.
GROUPS = {1: 1, 8: 1, 64: 2, 256: 4}
# Batch and time steps of a bare executor's call.
SHAPES = ((1, 1), (8, 1), (64, 1), (16, 16), (32, 16), (64, 16), (128, 16), (256, 16))
PLAIN_SHAPES = ((1, 1), (64, 1), (64, 16), (256, 16))
LIVE, ACTIVE = 10_000, 64


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of what is measured in turns (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "serving.json")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as name:
        results = run(Path(name), options.seconds, options.rounds)
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {options.output}")


def run(folder, seconds, rounds):
    models = folder / "models"
    results = {"machine": machine(), "seconds": seconds, "rounds": rounds}
    _, began = processes.stolen()
    print(", ".join(f"{name} {value}" for name, value in results["machine"].items()))
    script("export", models)
    with (
        BareExecutor(models) as bare,
        processes.server([sys.executable, HERE / "echo_server.py"], folder / "echo") as echo,
        processes.gateway(folder / "embedded", "--model-dir", models) as gateway,
        processes.gateway(folder / "one", "--model-dir", models, "--max-batch-size", 1) as one,
    ):
        one.wait_idle()
        warm_up(gateway)  # both have compiled what they will before anything is timed
        results["bare"] = sweep(bare, seconds)
        best = max(results["bare"], key=lambda case: case["steps_per_s"])
        yardstick = build_yardstick(folder)
        results["turns"] = [turn(seconds, bare, best, yardstick, echo, gateway, one) for _ in range(rounds)]
        results["gateway"] = grid(gateway, seconds)
    results["store"] = valkey(folder, models, seconds)
    results["predict"] = beside_predict(folder, models, seconds, rounds)
    results["live"] = live_sessions(folder, models, seconds, max(7, rounds))
    results["machine"]["stolen"], _ = processes.stolen(began)
    print(f"of the cores' time the host gave {results['machine']['stolen']:.1%} to others")
    results["ratios"] = ratios.of(results)
    print(f"\n{'':70}{'figure':>8}{'aim':>17}")
    for ratio in results["ratios"]:
        print("{name:70}{value:8.3f}   {aim:>14}".format(**ratio))
    return results


class BareExecutor:
    """The executor by itself, in a process of its own."""

    def __init__(self, models):
        command = [sys.executable, str(HERE / "parts.py"), "bare_executor", str(models)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._process.communicate()

    def measure(self, batch, steps, seconds, *, xla=True):
        print(json.dumps([batch, steps, xla, seconds]), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


def sweep(bare, seconds):
    """Over batch sizes, with XLA and without."""
    cases = []
    for xla, shapes in ((True, SHAPES), (False, PLAIN_SHAPES)):
        for batch, steps in shapes:
            case = bare.measure(batch, steps, seconds / 2, xla=xla)
            cases.append(case)
            kind = "XLA" if xla else "plain"
            print(
                f"bare executor, {batch:3} x {steps:2}, {kind:5}   {case['steps_per_s']:10,.0f} steps/s"
                f"   {case['ms']:6.2f} ms a call"
            )
    return cases


def turn(seconds, bare, best, yardstick, echo, gateway, one):
    """All that a ratio is made of, one after the other: what else the machine does then falls on all of it."""
    import yardstick as cpp

    groups = {sessions: ("--groups", number) for sessions, number in GROUPS.items()}
    at_best = functools.partial(bare.measure, best["batch"], best["steps"], seconds / 2, xla=best["xla"])
    measured = {
        "numpy": float(script("numpy_yardstick", seconds / 2, environment=ONE_CORE)),
        "single": load(gateway, "coalesced", 64, 1, seconds, *groups[64]),
        "single_asyncio": load(gateway, "asyncio", 64, 1, seconds, *groups[64]),
        "batch_1": load(one, "coalesced", 64, 1, seconds, *groups[64]),
        "streams": load(gateway, "stream", 64, 1, seconds),
        "echo": load(echo, "stream", 1, 1, seconds / 2),
        "one": load(gateway, "stream", 1, 1, seconds / 2),
        "alone": bare.measure(1, 1, seconds / 2),
        "best": at_best(),
        "full": load(gateway, "coalesced", 256, 16, seconds, *groups[256]),
        "full_asyncio": load(gateway, "asyncio", 256, 16, seconds, *groups[256]),
        "best_after": at_best(),
        "together": bare.measure(64, 16, seconds / 2),
        "cpp": cpp.measure(yardstick, batch=64, steps=16, seconds=seconds / 2, threads=2),
    }
    rates = {name: value if isinstance(value, float) else value["steps_per_s"] for name, value in measured.items()}
    print("turn: " + ", ".join(f"{name} {rate:,.0f}" for name, rate in rates.items()) + " steps/s")
    return measured


def build_yardstick(folder):
    """The C++ program, once it has been seen to compute the layer's step."""
    return Path(script("cpp_yardstick", folder))


def grid(gateway, seconds):
    """Closed loops over modes, sessions and steps a request; open loops over rates."""
    print(f"\n{'gateway':26}{'steps':>6}{'steps/s':>11}{'p50 ms':>9}{'p90':>8}{'p99':>8}   CPU us a request")
    cases = []
    for steps in (1, 16):
        for mode in ("coalesced", "asyncio", "stream", "unary"):
            for sessions in SESSIONS:
                more = ("--groups", GROUPS[sessions]) if mode in ("coalesced", "asyncio") else ()
                cases.append(shown(load(gateway, mode, sessions, steps, seconds, *more)))
    opened = (load(gateway, "open", 256, 1, seconds, "--rate", rate) for rate in RATES)
    return [*cases, *map(shown, opened)]


def valkey(folder, models, seconds):
    """Sessions in a Valkey of its own, written to its log each second."""
    import store_cost

    (folder / "valkey").mkdir()
    store, url = store_cost.start_valkey(folder / "valkey", "everysec")
    try:
        with processes.gateway(folder / "stored", "--model-dir", models, "--store", url) as gateway:
            warm_up(gateway)
            case = load(gateway, "coalesced", 64, 16, seconds, "--groups", GROUPS[64], store=store.pid)
            return shown(case, "sessions in Valkey")
    finally:
        store.terminate()
        store.wait()


def beside_predict(folder, models, seconds, rounds):
    """One session on a model server: through a gateway, and by ``Predict`` alone, in turns."""
    with (
        processes.model_server(folder / "models-server", models) as server,
        processes.gateway(folder / "front", "--tf-serving", server.target, "--model", "ntm") as gateway,
    ):
        turns = [
            (load(server, "predict", 1, 1, seconds / 2), load(gateway, "stream", 1, 1, seconds / 2))
            for _ in range(rounds)
        ]
    alone = statistics.median(bare["p50_ms"] for bare, _ in turns)
    added = statistics.median(through["p50_ms"] - bare["p50_ms"] for bare, through in turns)
    print(f"bare Predict, one session          p50 {alone:.3f} ms; through a gateway {added:+.3f} ms")
    return {"p50_ms": alone, "added_ms": added}


def live_sessions(folder, models, seconds, rounds):
    """CPU seconds a step with as many live sessions as are stepped, and with many more, in turns."""
    with (
        processes.gateway(folder / "few", "--model-dir", models) as few,
        processes.gateway(folder / "many", "--model-dir", models) as many,
    ):
        script("fill", many.target, LIVE - ACTIVE)
        warm_up(few)
        warm_up(many)
        turns = [
            [spent(load(gateway, "coalesced", ACTIVE, 1, seconds)) for gateway in (few, many)] for _ in range(rounds)
        ]
    medians = [statistics.median(side) for side in zip(*turns, strict=True)]
    print(
        f"CPU a step, {ACTIVE} of {ACTIVE:,} live sessions active  {medians[0]:.1f} us; of {LIVE:,} {medians[1]:.1f} us"
    )
    return {"active": ACTIVE, "live": LIVE, "few_us": medians[0], "many_us": medians[1], "turns": turns}


def spent(case):
    return case["gateway_cpu_us"] + case["executor_cpu_us"]


def warm_up(gateway):
    """Until what the loads need is compiled: the executor compiles the shapes that it is asked for."""
    for sessions, steps in ((64, 16), (8, 16), (1, 16)):
        load(gateway, "coalesced", sessions, steps, 0.5)
    gateway.wait_idle()


def load(server, mode, sessions, steps, seconds, *more, store=None):
    """What ``load.py`` saw, and the CPU time that the server and the store took for each request."""
    command = [HERE / "load.py", mode, server.target, "--sessions", sessions, "--steps", steps, "--seconds", seconds]
    command += ["--server", server.process.pid, *(() if store is None else ("--store", store)), *more]
    done = subprocess.run([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def shown(case, name=None):
    name = name or (f"open, {case['rate']:,.0f} a second" if case["mode"] == "open" else case["mode"])
    parts = ("client", "gateway", "executor", "store")
    cpu = ", ".join(f"{part} {case[f'{part}_cpu_us']:.0f}" for part in parts if f"{part}_cpu_us" in case)
    print(
        f"{name + ', ' + str(case['sessions']):26}{case['steps']:6}{case['steps_per_s']:11,.0f}{case['p50_ms']:9.2f}"
        f"{case['p90_ms']:8.2f}{case['p99_ms']:8.2f}   {cpu}"
    )
    return case


def script(name, *arguments, environment=None):
    """Runs one of ``benchmarks/parts.py`` in a process of its own; what it printed last."""
    command = [sys.executable, str(HERE / "parts.py"), name, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **(environment or {})}
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


def machine():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.partition(":")[2].strip() for line in lines if "model name" in line), platform.machine())
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
    }


if __name__ == "__main__":
    main()
