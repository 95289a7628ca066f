"""The main job, end to end: train a Neural Turing Machine to copy, export it, serve it, and step 32 sessions of it.

What `make demo` runs. Every sequence is stepped in random chunks beside 31 others, and has to come out as it went in.
"""

import argparse
import asyncio
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
import numpy as np
from demo_parts.copying import CopySequence, Run, make_sequence, step_all
from demo_parts.figure import save_figure, trace_sequence
from demo_parts.gateway import GatewayFailed, GatewayProcess
from demo_parts.offline import run_whole
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from service.client import ModelVersion, SequenceClient

ROOT = Path(__file__).resolve().parent.parent
MODEL = "copy"
SESSIONS = 32
LENGTHS = range(1, 61)
ROWS = ((1, 10), (11, 20), (21, 30), (31, 40), (41, 50), (51, 60))
FIGURE_LENGTH = 20
WARM_UP_LENGTH = 8

_LEGEND = """\
steps/s: time steps per second of one session; in the last row, of all sessions together.
p50, p99: from asking for a chunk of 1 to 12 time steps to having its outputs, all waiting included.
max diff: the largest difference of an output to serving_default on the whole sequence.
"""

console = Console(highlight=False)


class DemoFailed(Exception):
    """Something is not as it has to be; the text says what, and what to do."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the training and of the data (default: 0)")
    parser.add_argument("--model-dir", type=Path, default=ROOT / "models", help="where models are (default: models)")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/demo", help="for logs and the picture")
    parser.add_argument("--no-train", action="store_true", help="serve the newest copy model that is there already")
    options = parser.parse_args(argv)
    began = time.monotonic()
    try:
        run(options.seed, options.model_dir, options.run_dir, train=not options.no_train)
    except (DemoFailed, GatewayFailed, grpc.RpcError) as error:
        console.print(f"\n[bold red]The demo failed.[/] {escape(str(error))}", soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("\nInterrupted.")
        return 130
    console.print(f"\nDone in {_minutes(time.monotonic() - began)}.")
    return 0


def run(seed: int, model_dir: Path, run_dir: Path, *, train: bool) -> None:
    """The whole story."""
    run_dir.mkdir(parents=True, exist_ok=True)
    if train:
        _headline("1  Train", "a 128 x 20 memory learns to copy, until it makes no mistakes")
        train_and_export(seed, model_dir, run_dir / "training")
    version = newest_version(model_dir)
    _headline("2  Serve", f"ntm-serve as a process of its own, with {_shown(version)}")
    gateway = GatewayProcess(model_dir, run_dir)
    try:
        target = wait_for(gateway)
        _headline("3  Step", f"{SESSIONS} sessions at a time, lengths 1 to 60, in random chunks, all interleaved")
        runs, seconds = step(target, seed)
        _headline(
            "4  Look inside", f"one sequence of {FIGURE_LENGTH}, its state read through InspectSession at each step"
        )
        picture = draw(target, seed, run_dir / "copy.png")
        stop(gateway)
    finally:
        gateway.kill()
    _headline("5  Compare", "with serving_default of the same model, on the whole sequences")
    differences, tolerance = compare(version, runs, run_dir / "tensorflow.log")
    show(runs, seconds, differences)
    check(runs, differences, tolerance, seed)
    tell_what_is_next(picture, model_dir)


def train_and_export(seed: int, model_dir: Path, training_dir: Path) -> None:
    """Trains from nothing with the quick preset, its progress shown as it comes, and exports the next version."""
    before = _versions(model_dir)
    shutil.rmtree(training_dir, ignore_errors=True)
    command = [sys.executable, "training/train.py", "--task", MODEL, "--preset", "quick", "--seed", str(seed)]
    began = time.monotonic()
    places = ["--run-dir", str(training_dir.absolute()), "--export-dir", str(model_dir.absolute())]
    done = subprocess.run([*command, *places], cwd=ROOT, check=False)
    if done.returncode:
        raise DemoFailed(
            f"Training ended with exit code {done.returncode}; what it printed above says why. If it did not solve the "
            f"task, try another seed: make demo SEED={seed + 1}"
        )
    if _versions(model_dir) == before:
        raise DemoFailed(f"Training exported no new version under {_shown(model_dir / MODEL)}; see what it printed.")
    console.print(f"trained and exported in {_minutes(time.monotonic() - began)}")


def newest_version(model_dir: Path) -> Path:
    """The directory of the newest exported version."""
    versions = _versions(model_dir)
    if not versions:
        raise DemoFailed(f"There is no model under {_shown(model_dir / MODEL)}; run the demo without --no-train.")
    return model_dir / MODEL / str(max(versions))


def wait_for(gateway: GatewayProcess) -> str:
    """The gateway's address, once it is SERVING."""
    began = time.monotonic()
    with console.status("loading the model"):
        target = gateway.wait_until_serving()
    console.print(f"SERVING on {target} after {time.monotonic() - began:.1f} s; its log is {_shown(gateway.log)}")
    return target


def step(target: str, seed: int) -> tuple[list[Run], float]:
    """Steps a sequence of each length; returns what came of each, and the seconds that all of it took.

    Before it counts, a few short sequences warm the model up: its first batches of each shape are slow.
    """
    rng = np.random.default_rng(seed)
    version = served_version(target)
    lengths = rng.permutation(np.array(LENGTHS))
    sequences = [make_sequence(int(length), version.output_dim, rng) for length in lengths]
    _check_width(version, sequences[0])
    with console.status("warming up"):
        short = [make_sequence(WARM_UP_LENGTH, version.output_dim, rng) for _ in range(2 * SESSIONS)]
        asyncio.run(step_all(target, MODEL, short, SESSIONS, rng, lambda _: None))
    columns = (TextColumn("stepping"), BarColumn(), MofNCompleteColumn(), TextColumn("time steps"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=sum(len(sequence.inputs) for sequence in sequences))
        began = time.perf_counter()
        runs = asyncio.run(
            step_all(target, MODEL, sequences, SESSIONS, rng, lambda steps: progress.advance(task, steps))
        )
        return runs, time.perf_counter() - began


def served_version(target: str) -> ModelVersion:
    """What the gateway says about the version that new sessions get."""
    with SequenceClient(target) as client:
        return client.model(MODEL).versions[0]


def draw(target: str, seed: int, path: Path) -> Path:
    """Steps one more sequence, looks into its session at each step, and saves the picture."""
    bits = served_version(target).output_dim
    sequence = make_sequence(FIGURE_LENGTH, bits, np.random.default_rng([seed, FIGURE_LENGTH]))
    with console.status("stepping and looking"):
        save_figure(trace_sequence(target, MODEL, sequence), path)
    console.print(f"the picture is {_shown(path)}")
    return path


def stop(gateway: GatewayProcess) -> None:
    """Ends the gateway by SIGTERM; it has to drain and to end well."""
    began = time.monotonic()
    gateway.stop()
    console.print(f"the gateway drained and ended with exit code 0, {time.monotonic() - began:.1f} s after SIGTERM")


def compare(version: Path, runs: list[Run], log: Path) -> tuple[list[float], float]:
    """For each sequence, how far its stepped outputs are from the whole's at the most; and the tolerance."""
    with console.status("running the whole sequences"):
        whole, tolerance = run_whole(version, [one.sequence.inputs for one in runs], log)
    return [float(np.abs(one.outputs - y).max()) for one, y in zip(runs, whole, strict=True)], tolerance


def show(runs: list[Run], seconds: float, differences: list[float]) -> None:
    """Prints the table."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("length", "sequences", "bits", "bit errors", "steps/s", "p50 ms", "p99 ms", "max diff"):
        table.add_column(column, justify="right", no_wrap=True)
    pairs = list(zip(runs, differences, strict=True))
    for low, high in ROWS:
        some = [(one, difference) for one, difference in pairs if low <= one.sequence.length <= high]
        each = sum(len(one.outputs) for one, _ in some) / sum(one.seconds for one, _ in some)
        _add_row(table, f"{low}-{high}", some, each)
    table.add_section()
    _add_row(table, "all", pairs, sum(len(one.outputs) for one in runs) / seconds, bold=True)
    console.print(table)
    console.print(_LEGEND, soft_wrap=True, style="dim")


def check(runs: list[Run], differences: list[float], tolerance: float, seed: int) -> None:
    """Says what is wrong with the figures, if anything is."""
    wrong = sum(one.bit_errors for one in runs)
    if wrong:
        raise DemoFailed(
            f"{wrong} of {sum(one.sequence.target.size for one in runs)} bits came out wrong: with seed {seed} the "
            f"training did not solve the task. Try another one: make demo SEED={seed + 1}"
        )
    if max(differences) > tolerance:
        raise DemoFailed(
            f"Stepping differs from the whole sequence by {max(differences):.1e}; at most {tolerance:.1e} is expected. "
            "That is a bug of the gateway: please report it with the directory of the model."
        )
    console.print(f"[green]every bit right; stepped and whole agree within {tolerance:.0e}[/]")


def tell_what_is_next(picture: Path, model_dir: Path) -> None:
    """The two commands that a user would type next."""
    console.print(f"\nThe picture: [bold]{_shown(picture)}[/]")
    console.print("\nServe this model:")
    console.print(
        f"  [bold].venv/bin/ntm-serve --model-dir {_shown(model_dir)} --listen 127.0.0.1:50051[/]", soft_wrap=True
    )
    console.print("Talk to it from Python:")
    console.print("  [bold].venv/bin/python examples/client.py[/]")


def _add_row(table: Table, name: str, some: list[tuple[Run, float]], per_second: float, *, bold: bool = False) -> None:
    latencies = 1e3 * np.concatenate([one.latencies for one, _ in some])
    errors = sum(one.bit_errors for one, _ in some)
    table.add_row(
        name,
        f"{len(some)}",
        f"{sum(one.sequence.target.size for one, _ in some):,}",
        f"[green]{errors}[/]" if not errors else f"[red]{errors:,}[/]",
        f"{per_second:,.0f}",
        f"{np.percentile(latencies, 50):.1f}",
        f"{np.percentile(latencies, 99):.1f}",
        f"{max(difference for _, difference in some):.1e}",
        style="bold" if bold else None,
    )


def _check_width(version: ModelVersion, sequence: CopySequence) -> None:
    if sequence.inputs.shape[1] != version.input_dim:
        raise DemoFailed(
            f"{MODEL} version {version.version} takes {version.input_dim} inputs and gives {version.output_dim}. A "
            f"model that copies takes {version.output_dim + 2}, bits and two flags: run the demo without --no-train."
        )


def _versions(model_dir: Path) -> set[int]:
    found = model_dir / MODEL
    return {int(path.name) for path in found.iterdir() if path.name.isdigit()} if found.is_dir() else set()


def _headline(title: str, what: str) -> None:
    console.print(f"\n[bold cyan]{title}[/]  {what}", soft_wrap=True)


def _shown(path: Path) -> str:
    """A path as a user would type it here."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60} min {seconds % 60:.0f} s" if seconds >= 60 else f"{seconds:.0f} s"


if __name__ == "__main__":
    sys.exit(main())
