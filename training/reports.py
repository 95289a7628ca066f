"""Where a run stands, a look at it, and what it gave: values that the loop hands out."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import keras

from training.results import Row
from training.step import Progress


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave.

    Attributes:
        model: the network kept, with its full memory.
        solved: whether the last validation was without a fault.
        attempts: networks started.
        updates: of all attempts.
        sequences: trained on, of all attempts.
        seconds: from the call to the return, compilation included; of the last call, if the run was resumed.
        validation_wrong_bits: mean wrong bits of a validation sequence, of the network kept; None if there
            was no validation.
        spoilt: networks given up because a loss or a weight was no number any more.
    """

    model: keras.Sequential
    solved: bool
    attempts: int
    updates: int
    sequences: int
    seconds: float
    validation_wrong_bits: float | None
    spoilt: int = 0

    def summary(self) -> dict[str, Any]:
        """Everything but the model, for JSON."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}


@dataclass(kw_only=True)
class Position:
    """Where a run stands. With the variables of the trainer, all that resuming needs.

    Attributes:
        attempt: which network, from 0.
        step: updates of this attempt.
        learned_at: the step at which the task was learned, or None while searching.
        updates: of all attempts.
        best: shortfall of the best validation so far (mean wrong bits; see `training.evaluation.shortfall`).
        best_loss: its mean loss in bits, which decides among equals.
        finished: nothing is left to do.
        solved: enough validations in a row were without a fault.
        faultless: how many of the last were, since the noise is off.
        difficulty: of the sequences drawn, 0..1.
        spoilt: networks given up because a loss or a weight was no number any more.
    """

    attempt: int = 0
    step: int = 0
    learned_at: int | None = None
    updates: int = 0
    best: float = math.inf
    best_loss: float = math.inf
    finished: bool = False
    solved: bool = False
    faultless: int = 0
    difficulty: float = 1.0
    spoilt: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """A look at a run that goes on.

    Attributes:
        position: where it stands.
        progress: of the last chunk of updates.
        sequences: trained on so far, of all attempts.
        seconds: since the call.
        validation: mean wrong bits of a validation sequence, where there was a validation.
        table: a row for each test size, where they were asked for.
    """

    position: Position
    progress: Progress
    sequences: int
    seconds: float
    validation: float | None
    table: tuple[Row, ...] = ()
