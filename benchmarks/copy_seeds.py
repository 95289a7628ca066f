"""Whether the quick recipe solves copy from every seed: one run of ``training/train.py`` after the other.

Each run is a process of its own, compilation and the reading of TensorFlow included in its seconds; then
``training/evaluate.py`` measures the network that it kept on fresh sequences of every length. A seed that was measured
before, in the same folder, is not run again.

    python benchmarks/copy_seeds.py --seeds 0-9 --json benchmarks/results/copy_seeds.json
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent


def parse_seeds(text):
    """From "3,100-109" to the list of the numbers."""
    seeds = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        seeds.extend(range(int(first), int(last or first) + 1))
    return seeds


def run(script, *arguments):
    """Runs a script of the trainer; returns its wall-clock seconds."""
    began = time.monotonic()
    command = [sys.executable, f"training/{script}", *map(str, arguments)]
    # train.py exits with 1 where the task was not solved: the table shows that.
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    if done.returncode > 1:
        sys.exit(done.stdout + done.stderr)
    return time.monotonic() - began


def measure(seed, folder, sequences):
    """Trains and evaluates one seed; the measured row, as it is kept beside the run."""
    run_dir = folder / str(seed)
    kept = run_dir / "row.json"
    if kept.exists():
        return json.loads(kept.read_text())
    before = os.times()
    seconds = run("train.py", "--seed", seed, "--no-export", "--run-dir", run_dir)
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    run("evaluate.py", run_dir, "--no-pictures", "--sequences", sequences)
    result = json.loads((run_dir / "result.json").read_text())
    rows = json.loads((run_dir / "evaluation.json").read_text())["rows"]
    row = {
        "seed": seed,
        "solved": result["solved"],
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu, 1),
        "sequences": result["sequences"],
        "networks": result["attempts"],
        "wrong_bits": {str(r["size"][0]): r["wrong_bits"] for r in rows},
        "exact": {str(r["size"][0]): r["exact"] for r in rows},
    }
    kept.write_text(json.dumps(row) + "\n")
    return row


def print_table(rows, sequences):
    lengths = list(rows[0]["wrong_bits"])
    table = Table(title=f"wrong bits a sequence, mean of {sequences} sequences at each length")
    for heading in ("seed", "s", "CPU s", "sequences", "networks", *lengths):
        table.add_column(heading, justify="right")
    for row in rows:
        costs = (f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['sequences']:,}", str(row["networks"]))
        table.add_row(str(row["seed"]), *costs, *(f"{row['wrong_bits'][n]:g}" for n in lengths))
    medians = (f"{statistics.median(row['wrong_bits'][n] for row in rows):g}" for n in lengths)
    table.add_row("median", "", "", "", "", *medians)
    Console(width=140).print(table)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seeds", type=parse_seeds, default=parse_seeds("0-9"), help="such as 3,100-109 (default: 0-9)"
    )
    parser.add_argument("--sequences", type=int, default=1000, help="at each length (default: 1000)")
    parser.add_argument("--folder", type=Path, default=Path("runs/copy-seeds"), help="of the runs")
    parser.add_argument("--json", type=Path, default=None, help="where the rows are written too")
    options = parser.parse_args()
    rows = []
    for seed in options.seeds:
        rows.append(measure(seed, options.folder.resolve(), options.sequences))
        print(rows[-1], flush=True)
    print_table(rows, options.sequences)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"sequences": options.sequences, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
