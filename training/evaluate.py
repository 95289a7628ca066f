"""`python training/evaluate.py RUN`: how well a trained network does, as a table and as pictures."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # Run as a file: its own directory gives way to the project's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from training.config import ConfigError, RunConfig
from training.results import Row


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measures trained networks at sizes inside and past the trained range. "
        "Prints the table, and writes evaluation.json and pictures into the first run's directory.",
    )
    add = result.add_argument
    add("run", type=Path, nargs="+", help="the directory of a run; more of them are compared with the first")
    add("--sequences", type=int, default=1000, metavar="N", help="sequences at each size (default: 1000)")
    add("--seed", type=int, default=1_000_003, help="of the sequences (default: 1000003)")
    add("--no-pictures", action="store_true", help="the table only")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses, measures, draws. Returns the exit status: 0, or 2 for a bad option."""
    options = parser().parse_args(arguments)
    try:
        configs = {run: RunConfig.load(run) for run in options.run}
        _check(options.run, options.sequences)
    except ConfigError as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    _evaluate(configs, options.sequences, options.seed, pictures=not options.no_pictures)
    return 0


def _check(runs: Sequence[Path], sequences: int) -> None:
    """Refuses what cannot be measured."""
    if sequences < 1:
        raise ConfigError(f"--sequences should be at least 1; received {sequences}")
    for run in runs:
        if not (run / "best.keras").is_file():
            raise ConfigError(f"expected a trained network, best.keras, in {run}; it has none yet")


def _evaluate(configs: dict[Path, RunConfig], sequences: int, seed: int, *, pictures: bool) -> None:
    # Imported late: --help and a refused option need no TensorFlow.
    import keras
    import numpy as np

    import ntm  # noqa: F401  the layer has to be registered before a model with it is loaded
    from training import plots
    from training.evaluation import Evaluator

    tables: dict[Path, list[Row]] = {}
    for run, config in configs.items():
        model = keras.saving.load_model(run / "best.keras")
        tables[run] = Evaluator(model).table(config.make_task(), sequences=sequences, seed=seed)
        print_table(run, tables[run])
        text = json.dumps({"seed": seed, "rows": [row._asdict() for row in tables[run]]}, indent=2)
        (run / "evaluation.json").write_text(text + "\n")
    if not pictures:
        return
    first = next(iter(configs))
    plots.learning_curves([run for run in configs if (run / "metrics.jsonl").is_file()], first / "learning.png")
    plots.generalisation({run.name: rows for run, rows in tables.items()}, first / "generalisation.png")
    model, task = keras.saving.load_model(first / "best.keras"), configs[first].make_task()
    if "ntm" in {layer.name for layer in model.layers}:
        batch = task.test_batch(np.random.default_rng(seed), 1, task.sizes()[len(task.sizes()) // 2])
        plots.memory_use(model, batch, first / "memory.png")
    print("pictures:", *sorted(str(path) for path in first.glob("*.png")))


def print_table(run: Path, rows: Sequence[Row]) -> None:
    """The table of one run: a line for each size."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=str(run))
    headings = ["size", "sequences", "bits asked", "wrong (mean)", "wrong (median)", "right", "loss, bits", "exact"]
    known = any(row.optimal_bits is not None for row in rows)
    for heading in [*headings, "optimal, bits"] if known else headings:
        table.add_column(heading, justify="right")
    for size, sequences, asked, wrong, median, loss, exact, optimal in rows:
        right = f"{100 * (1 - wrong / asked):.3f} %"
        cells = (f"{asked:.0f}", f"{wrong:.4f}", f"{median:g}", right, f"{loss:.3f}", f"{100 * exact:.1f} %")
        best = () if optimal is None else (f"{optimal:.3f}",)
        table.add_row("x".join(map(str, size)), str(sequences), *cells, *best)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
