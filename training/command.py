"""What the command line does once it is parsed: train with the progress shown, tell the result, export."""

import os
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from training.config import ConfigError, RunConfig
from training.loop import train_and_evaluate
from training.reports import Report, Result


def run_training(
    config: RunConfig, run_dir: Path, *, export_dir: Path | None, name: str, verbose: bool, only_solved: bool = False
) -> int:
    """Trains, prints what came out, and exports.

    Returns:
        The exit status: 0; 1 if the task was not solved (the best network is exported all the same, unless
        ``only_solved``); 2 if the directory holds another run.
    """
    console = Console(highlight=False)
    console.print(f"{config.task}, {config.model.kind}, seed {config.seed}: run directory {run_dir}")
    with _Display(console, config, verbose) as display:
        try:
            result = train_and_evaluate(config, run_dir, on_report=display.report)
        except ConfigError as error:
            console.print(f"train.py: {error}")
            return 2
    _tell(console, config, result, run_dir)
    if export_dir is not None and (result.solved or not only_solved):
        # Imported late: --no-export works without what the export needs.
        from training.export import export_model

        provenance = {"config": config.to_json(), **result.summary()}
        path = export_model(result.model, export_dir, name=name, task=config.task, provenance=provenance)
        console.print(f"exported: {os.path.relpath(path)}")
    return 0 if result.solved else 1


def _tell(console: Console, config: RunConfig, result: Result, run_dir: Path) -> None:
    wrong = result.validation_wrong_bits
    best = "never learned" if wrong is None else f"{wrong:.2f} wrong bits a validation sequence"
    verdict = "solved" if result.solved else f"NOT solved ({best})"
    tried = "" if result.attempts == 1 else f", network {result.attempts} of at most {config.recipe.attempts}"
    console.print(f"{verdict} after {result.sequences:,} sequences in {result.seconds:.0f} s{tried}")
    console.print(f"the table and the pictures: python training/evaluate.py {run_dir}")


class _Display:
    """A bar that shows where the run stands; with ``verbose`` or no terminal, lines."""

    def __init__(self, console: Console, config: RunConfig, verbose: bool) -> None:
        self._recipe = config.recipe
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
        eta = left * report.seconds / max(1, position.updates)
        checked = "" if report.validation is None else f", validation {report.validation:.2f} wrong"
        return (
            f"network {position.attempt + 1} {phase}, {report.sequences:,} sequences: "
            f"loss {progress.bits_per_sequence:.2f} bits/sequence, {progress.wrong_bits:.2f} wrong{checked}, "
            f"{report.seconds:.0f} s, at most {eta:.0f} s left for this network"
        )
