"""How long the processes take to start, and what memory they start with: ``python benchmarks/startup.py``.

Each is started anew for each round: until its port is open, until it is SERVING (models loaded, stepping uncompiled),
and its resident memory then. The client is a process that imports it and ends. Medians of the rounds.
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

import processes
from processes import BIN, MIB, ROOT

HERE = Path(__file__).resolve().parent
IMPORTS = {
    "import the client": "import service.client",
    "import the gateway, no models": "import service.server, service.executors.tf_serving",
    "import TensorFlow": "import tensorflow",
}
TELL = "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS:')))"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "startup.json")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with tempfile.TemporaryDirectory() as name:
        rounds = list(measure(Path(name), options.rounds))
    results = [{key: _median(case[key] for case in same) for key in same[0]} for same in zip(*rounds, strict=True)]
    print(f"{'':34}{'port open s':>12}{'serving s':>11}{'MiB':>7}")
    for case in results:
        port = f"{case['port_s']:12.2f}" if "port_s" in case else f"{'':12}"
        print(f"{case['name']:34}{port}{case['ready_s']:11.2f}{case['mib']:7.0f}")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps({"rounds": options.rounds, "cases": results}, indent=1) + "\n")


def measure(folder, rounds):
    models = folder / "models"
    subprocess.run([sys.executable, str(HERE / "parts.py"), "export", str(models)], check=True, cwd=ROOT)
    with processes.model_server(folder / "server", models) as server:
        serving = ["--tf-serving", server.target, "--model", "ntm"]
        for number in range(rounds):
            yield [
                *(imported(name, code) for name, code in IMPORTS.items()),
                started(folder / f"front-{number}", "ntm-serve --tf-serving", [BIN / "ntm-serve", *serving]),
                started(
                    folder / f"embedded-{number}", "ntm-serve --model-dir", [BIN / "ntm-serve", "--model-dir", models]
                ),
            ]


def imported(name, code):
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code + TELL], capture_output=True, text=True, check=True, cwd=ROOT)
    return {
        "name": name,
        "ready_s": time.perf_counter() - began,
        "mib": int(done.stdout.splitlines()[-1]) * 1024 / MIB,
    }


def started(folder, name, command):
    began = time.perf_counter()
    with processes.server(command, folder) as gateway:
        gateway.wait_port()
        port_s = time.perf_counter() - began
        gateway.wait_serving()
        ready_s = time.perf_counter() - began
        return {"name": name, "port_s": port_s, "ready_s": ready_s, "mib": gateway.resident_bytes() / MIB}


def _median(values):
    values = list(values)
    return values[0] if isinstance(values[0], str) else statistics.median(values)


if __name__ == "__main__":
    main()
