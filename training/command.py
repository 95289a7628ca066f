"""What the command line does once it is parsed: train with the progress shown, tell the result, export."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import keras
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from training.checkpoint import change_recipe
from training.checks import ConfigError
from training.config import RunConfig
from training.evaluation import Evaluator
from training.exporting.command import export_under_tensorflow
from training.exporting.publication import Target
from training.loop import train_and_evaluate
from training.reports import Report, Result
from training.results import Row

# At each test size: enough to tell a network that solves it from one that does not.
_TEST_SEQUENCES = 64


def run_training(
    config: RunConfig,
    run_dir: Path,
    *,
    target: Target | None,
    only_solved: bool = False,
    verbose: bool = False,
    epochs: int | None = None,
    data_parallel: bool = False,
    new_recipe: bool = False,
) -> int:
    """Trains, prints what came out, and exports.

    Args:
        config: the run.
        run_dir: its directory.
        target: where the export goes; None for no export.
        only_solved: export nothing unless the task was solved.
        verbose: show the accuracy at each test size after every epoch.
        epochs: looks at the loss after which to stop; None goes on to the end.
        data_parallel: spread every batch over all devices.
        new_recipe: the directory holds a run of another recipe, which goes on under this one.

    Returns:
        The exit status: 0; 1 if the task was not solved (the best network is exported all the same, unless
        ``only_solved``); 2 if the directory holds another run, or what was trained cannot be exported; 130 if it was
        interrupted.
    """
    console = Console(highlight=False, soft_wrap=True)
    backend = keras.backend.backend()
    console.print(f"{config.task}, {config.model.kind}, seed {config.seed}, on {backend}: run directory {run_dir}")
    with _Display(console, config, verbose, epochs) as display:
        try:
            if new_recipe:
                change_recipe(run_dir, config)
            result = train_and_evaluate(
                config,
                run_dir,
                on_report=display.report,
                max_updates=None if epochs is None else epochs * config.recipe.chunk,
                test_sequences=_TEST_SEQUENCES if verbose else 0,
                data_parallel=data_parallel,
            )
        except ConfigError as error:
            console.print(f"train.py: {error}")
            return 2
        except KeyboardInterrupt:
            console.print("interrupted; the same command goes on from the last look")
            return 130
    _tell(console, config, result, run_dir)
    if epochs is not None and not result.solved and result.updates >= epochs * config.recipe.chunk:
        console.print(f"stopped after {epochs} epochs; the same command with a higher -e goes on")
    if not result.solved and only_solved:
        target = None
    if target is not None and not _export(console, config, result, run_dir, target):
        return 2
    return 0 if result.solved else 1


def _export(console: Console, config: RunConfig, result: Result, run_dir: Path, target: Target) -> bool:
    """Exports the network kept; in a process of its own where Keras runs on something else than TensorFlow."""
    if keras.backend.backend() != "tensorflow":
        return export_under_tensorflow(run_dir, target) == 0
    # Imported late: --no-export works without what the export needs.
    from training.export import export_model

    provenance = {"config": config.to_json(), **result.summary()}
    try:
        path = export_model(
            result.model,
            target.directory,
            name=target.name,
            version=target.version,
            task=config.task,
            provenance=provenance,
        )
    except (ValueError, FileExistsError) as error:
        console.print(f"train.py: trained, but not exported: {error}")
        return False
    console.print(f"exported: {os.path.relpath(path)}")
    return True


def _tell(console: Console, config: RunConfig, result: Result, run_dir: Path) -> None:
    wrong = result.validation_wrong_bits
    best = "never learned" if wrong is None else f"{wrong:.2f} wrong bits a validation sequence"
    verdict = "solved" if result.solved else f"NOT solved ({best})"
    tried = "" if result.attempts == 1 else f", network {result.attempts} of at most {config.recipe.attempts}"
    if result.spoilt:
        tried += f"; {result.spoilt} stopped at a loss that was no number, the last good weights were kept"
    console.print(f"{verdict} after {result.sequences:,} sequences in {result.seconds:.0f} s{tried}")
    table = Evaluator(result.model, compiled=False).table(
        config.make_task(), sequences=_TEST_SEQUENCES, seed=config.seed + 1
    )
    console.print(f"accuracy over {_TEST_SEQUENCES} sequences each: {accuracies(table)}")
    console.print(f"the table and the pictures: python training/evaluate.py {run_dir}")


def accuracies(table: Sequence[Row]) -> str:
    """The share of the bits that are right at each test size, in a line."""
    return ", ".join(
        f"{'x'.join(map(str, row.size))}: {100 * (1 - row.wrong_bits / row.asked_bits):.2f} %" for row in table
    )


class _Display:
    """A bar that shows where the run stands; with ``verbose`` or no terminal, lines."""

    def __init__(self, console: Console, config: RunConfig, verbose: bool, epochs: int | None) -> None:
        self._recipe = config.recipe
        self._updates = None if epochs is None else epochs * config.recipe.chunk
        self._console = console
        self._lines = verbose or not console.is_terminal
        self._every = 1 if verbose else 5
        self._reports = 0
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=self._lines)
        self._task: TaskID = self._bar.add_task(
            "compiling", total=self._recipe.search_steps + self._recipe.settle_steps
        )

    def __enter__(self) -> Self:
        self._bar.start()
        if self._lines:
            self._console.print("compiling ...")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def report(self, report: Report) -> None:
        """Shows a look at the run."""
        text = self._text(report)
        self._bar.update(self._task, description=text, completed=self._done(report))
        if self._lines and (self._reports % self._every == 0 or report.position.finished):
            self._console.print(text)
        if report.table:
            self._console.print(f"  accuracy: {accuracies(report.table)}")
        self._reports += 1

    def _done(self, report: Report) -> int:
        """Updates of this attempt; once learned, the rest of the search is done with."""
        learned_at = report.position.learned_at
        return report.position.step + (0 if learned_at is None else self._recipe.search_steps - learned_at)

    def _text(self, report: Report) -> str:
        """Phase, loss, bits and what is left at most."""
        position, progress = report.position, report.progress
        phase = "searching" if position.learned_at is None else "settling"
        left = self._recipe.search_steps + self._recipe.settle_steps - self._done(report)
        if self._updates is not None:
            left = min(left, self._updates - position.updates)
        eta = left * report.seconds / max(1, position.updates)
        checked = "" if report.validation is None else f", validation {report.validation:.2f} wrong"
        return (
            f"network {position.attempt + 1} {phase}, {report.sequences:,} sequences: "
            f"loss {progress.bits_per_sequence:.2f} bits/sequence, {progress.wrong_bits:.2f} wrong{checked}, "
            f"{report.seconds:.0f} s, at most {eta:.0f} s left for this network"
        )
