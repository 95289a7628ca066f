"""What a run writes as it goes on: a line of JSON for each look, and the same for TensorBoard."""

import json
import math
from pathlib import Path
from typing import Any

from tensorboard.summary import Writer

from training.reports import Report

METRICS = "metrics.jsonl"


class RunLog:
    """``metrics.jsonl`` and, beside it, TensorBoard's event file, which always tells the same.

    A run that is resumed takes up where its checkpoint stands: the lines after that are dropped, because their updates
    are made again.

    Args:
        run_dir: the run's directory.
        updates: where the checkpoint stands.
    """

    def __init__(self, run_dir: Path, updates: int) -> None:
        self._path = run_dir / METRICS
        kept = [line for line in _whole_lines(self._path) if line["updates"] <= updates]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept))
        for old in run_dir.glob("events.out.tfevents.*"):
            old.unlink()
        self._events = Writer(str(run_dir))
        for line in kept:
            self._show(line)

    def write(self, report: Report) -> None:
        """Adds a look."""
        line = _line(report)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._show(line)
        self._events.flush()

    def close(self) -> None:
        """Ends the event file."""
        self._events.close()

    def _show(self, line: dict[str, Any]) -> None:
        """Each figure as a curve over the updates."""
        for name in ("nats_per_bit", "bits_per_sequence", "wrong_bits", "validation", "difficulty"):
            if line.get(name) is not None:
                self._events.add_scalar(name, line[name], line["updates"])


def _line(report: Report) -> dict[str, Any]:
    position = report.position
    line: dict[str, Any] = {"attempt": position.attempt, "step": position.step, "updates": position.updates}
    line |= {"sequences": report.sequences, "seconds": round(report.seconds, 3), "validation": report.validation}
    line |= {"learned": position.learned_at is not None, "difficulty": position.difficulty, "spoilt": position.spoilt}
    # JSON has no word for what is no number.
    figures = {name: float(value) for name, value in report.progress._asdict().items()}
    return line | {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; a last one that was cut off while it was written is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]
