"""`python training/evaluate.py RUN`: how well a trained network does, as a table and as pictures."""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if __package__ in (None, ""):  # Run as a file: its own directory gives way to the project's.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from training.checks import ConfigError
from training.config import RunConfig
from training.results import Row

# Sequences at each size from which on compiling pays.
_WORTH_COMPILING = 500


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(
        prog="evaluate.py",
        description="Measures trained networks at sizes inside and past the trained range. "
        "Prints the table, and writes evaluation.json into each run's directory and pictures into the first one's.",
    )
    add = result.add_argument
    add("run", type=Path, nargs="+", help="the directory of a run; more of them are compared with the first")
    add("--sequences", type=int, default=1000, metavar="N", help="sequences at each size (default: 1000)")
    add("--seed", type=int, default=1_000_003, help="of the sequences (default: 1000003)")
    output = "write everything there, under the names of the runs where there are several (default: beside the runs)"
    add("--output", type=Path, default=None, metavar="DIR", help=output)
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
    _evaluate(configs, options)
    return 0


def _check(runs: Sequence[Path], sequences: int) -> None:
    """Refuses what cannot be measured."""
    if sequences < 1:
        raise ConfigError(f"--sequences should be at least 1; received {sequences}")
    for run in runs:
        if not (run / "best.keras").is_file():
            raise ConfigError(f"expected a trained network, best.keras, in {run}; it has none yet")


def _evaluate(configs: Mapping[Path, RunConfig], options: argparse.Namespace) -> None:
    # Imported late: --help and a refused option need no Keras.
    import keras

    import ntm  # noqa: F401  the layer has to be registered before a model with it is loaded
    from training.evaluation import Evaluator

    tables: dict[Path, list[Row]] = {}
    for run, config in configs.items():
        model = keras.saving.load_model(run / "best.keras")
        # A compile for each size costs more than it saves where there is little to run.
        evaluator = Evaluator(model, compiled=options.sequences >= _WORTH_COMPILING)
        tables[run] = evaluator.table(config.make_task(), sequences=options.sequences, seed=options.seed)
        print_table(run, tables[run])
        text = json.dumps({"seed": options.seed, "rows": [row._asdict() for row in tables[run]]}, indent=2)
        place = _place(run, options.output, several=len(configs) > 1)
        (place / "evaluation.json").write_text(text + "\n")
    if not options.no_pictures:
        first = next(iter(configs))
        print("pictures:", *_draw(configs, tables, options.output or first, options.seed))


def _place(run: Path, output: Path | None, *, several: bool) -> Path:
    """Where the figures of a run are written; made if missing."""
    place = run if output is None else output / run.name if several else output
    place.mkdir(parents=True, exist_ok=True)
    return place


def _draw(
    configs: Mapping[Path, RunConfig], tables: Mapping[Path, Sequence[Row]], directory: Path, seed: int
) -> list[Path]:
    """The pictures that there is something for: learning curves, generalisation, and the first run's use of memory."""
    import keras
    import numpy as np

    from training import plots

    drawn = [directory / "generalisation.png"]
    plots.generalisation({run.name: rows for run, rows in tables.items()}, drawn[0])
    if told := [run for run in configs if (run / "metrics.jsonl").is_file()]:
        drawn.append(directory / "learning.png")
        plots.learning_curves(told, drawn[-1])
    run, config = next(iter(configs.items()))
    model, task = keras.saving.load_model(run / "best.keras"), config.make_task()
    if "ntm" in {layer.name for layer in model.layers}:
        drawn.append(directory / "memory.png")
        batch = task.test_batch(np.random.default_rng(seed), 1, task.sizes()[len(task.sizes()) // 2])
        plots.memory_use(model, batch, drawn[-1])
    return drawn


def print_table(run: Path, rows: Sequence[Row]) -> None:
    """The table of one run: a line for each size. Wrong bits, their median and the loss are those of a sequence."""
    from rich.console import Console
    from rich.table import Table

    # How many is said above: as a column of its own it made the table wider than many terminals.
    table = Table(title=f"{run}, {rows[0].sequences:,} sequences of each size")
    headings = ["size", "bits", "wrong", "median", "right %", "loss, bits", "exact %"]
    known = any(row.optimal_bits is not None for row in rows)
    for heading in [*headings, "optimum"] if known else headings:
        table.add_column(heading, justify="right")
    for size, _, asked, wrong, median, loss, exact, optimal in rows:
        right = f"{100 * (1 - wrong / asked):.3f}"
        cells = (f"{asked:.0f}", f"{wrong:.4f}", f"{median:g}", right, f"{loss:.3f}", f"{100 * exact:.1f}")
        best = () if optimal is None else (f"{optimal:.3f}",)
        table.add_row("x".join(map(str, size)), *cells, *best)
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
