"""What idle sessions take of a gateway's memory: ``python benchmarks/idle_sessions.py``.

Opens 10,000 sessions of the copy model, steps each by a chunk of 16 time steps, and compares what the gateway's
resident memory grew by with the bytes of the sessions' states and last replies: all that has to be kept.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from service.client import SequenceClient

sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes
from processes import MIB

STEPS = 16
AT_ONCE = 500


def fill(target, count):
    """Opens so many sessions and steps each once; returns the bytes of state and last reply of one session."""
    with SequenceClient(target, timeout=300) as client:
        version = client.model("copy").versions[0]
        chunks = np.random.default_rng(0).random((count, STEPS, version.input_dim), np.float32)
        for begin in range(0, count, AT_ONCE):
            sessions = [client.create_session("copy") for _ in range(begin, min(count, begin + AT_ONCE))]
            client.step_many(list(zip(sessions, chunks[begin : begin + AT_ONCE], strict=True)))
        return 4 * (version.state_size + STEPS * version.output_dim)


def empty(target):
    with SequenceClient(target, timeout=300) as client:
        for info in list(client.sessions()):
            client.attach(info.session_id, position=info.position).close()


def run(folder, count):
    processes.export_copy_model(folder / "models")
    with processes.gateway(folder, "--model-dir", folder / "models") as gateway:
        gateway.wait_idle()
        fresh = gateway.resident_bytes()
        fill(gateway.target, AT_ONCE)
        empty(gateway.target)
        gateway.wait_idle()
        warm = gateway.resident_bytes()
        needed = count * fill(gateway.target, count)
        gateway.wait_idle()
        full = gateway.resident_bytes()
    return {"sessions": count, "fresh": fresh, "warm": warm, "full": full, "needed": needed}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--output", type=Path, default=processes.ROOT / "benchmarks" / "results" / "idle_sessions.json")
    parser.add_argument("--folder", type=Path, help="keeps the exported model there for the next run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        results = run(options.folder or Path(name), options.sessions)
    print(f"states and last replies of {options.sessions:,} sessions   {results['needed'] / MIB:8.1f} MiB")
    for name, what in (("warm", "a gateway that has stepped before"), ("fresh", "a gateway that has just started")):
        grown = results["full"] - results[name]
        print(f"resident, above {what:36}{grown / MIB:8.1f} MiB   {grown / results['needed']:.2f} times that")
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {options.output}")


if __name__ == "__main__":
    main()
