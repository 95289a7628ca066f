"""The one function that trains: search for a network that learns, settle it, check it, keep it."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.config import RunConfig
from training.evaluation import Evaluator
from training.models import build_model
from training.step import Progress, Rates, Trainer
from training.tasks import Batch

# Streams of random numbers that must not meet.
_DATA, _VALIDATION, _WEIGHTS, _EXAMINATION = 1, 2, 3, 4


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
    """

    model: keras.Sequential
    solved: bool
    attempts: int
    updates: int
    sequences: int
    seconds: float
    validation_wrong_bits: float | None

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
        best: mean wrong bits of the best validation so far.
        best_loss: its mean loss in bits, which decides among equals.
        finished: nothing is left to do.
        solved: enough validations in a row were without a fault.
        faultless: how many of the last were, since the noise is off.
        difficulty: of the sequences drawn, 0..1.
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


@dataclass(frozen=True, kw_only=True)
class Report:
    """A look at a run that goes on."""

    position: Position
    progress: Progress
    sequences: int
    seconds: float
    validation: float | None


def train_and_evaluate(
    config: RunConfig,
    run_dir: Path | str,
    *,
    on_report: Callable[[Report], None] | None = None,
    max_updates: int | None = None,
) -> Result:
    """Trains one network, or resumes the run that the directory holds, and leaves there all that belongs to it.

    In ``run_dir``: ``config.json``, ``metrics.jsonl``, ``checkpoint.npz`` (to resume), ``best.keras`` (the best
    validated network) and ``result.json``.

    Args:
        config: the run.
        run_dir: made if missing. If it holds a run, that must be of an equal config.
        on_report: called after each chunk of updates.
        max_updates: stop there, resumable; None goes on to the end.

    Raises:
        ConfigError: the directory holds a run of another config.
    """
    run = _Run(config, Path(run_dir), on_report)
    return run.go(max_updates)


class _Run:
    """The state of one call of `train_and_evaluate`."""

    def __init__(self, config: RunConfig, run_dir: Path, on_report: Callable[[Report], None] | None) -> None:
        self.began = time.monotonic()
        self.config, self.recipe, self.run_dir, self.on_report = config, config.recipe, run_dir, on_report
        self.task = config.make_task()
        self.noise = keras.Variable(0.0, trainable=False, name="head_parameter_noise")
        self.trainer = Trainer(self._build(0, small=True), self.recipe, self.noise)
        self.kept = self._build(0, small=False)
        self.evaluator = Evaluator(self.kept, compiled=self.recipe.compiled)
        self.validation = self.task.validation_batch(
            np.random.default_rng([config.seed, _VALIDATION]), self.recipe.validation_size
        )
        self.position = self._begin()

    def go(self, max_updates: int | None) -> Result:
        """Chunk after chunk, to the end or to the limit."""
        limit = math.inf if max_updates is None else max_updates
        while not self.position.finished and self.position.updates < limit:
            progress = self.trainer.run(self._batches(), self._rates())
            self._advance(progress)
        self._load_best()
        result = Result(
            model=self.kept,
            solved=self.position.solved,
            attempts=self.position.attempt + 1,
            updates=self.position.updates,
            sequences=self.position.updates * self.recipe.batch_size,
            seconds=time.monotonic() - self.began,
            validation_wrong_bits=self.position.best if math.isfinite(self.position.best) else None,
        )
        (self.run_dir / "result.json").write_text(json.dumps(result.summary(), indent=2) + "\n")
        return result

    def _advance(self, progress: Progress) -> None:
        """Books a chunk: learned? validated? stuck? Then reports, and saves where the run stands."""
        position, recipe = self.position, self.recipe
        position.step += recipe.chunk
        position.updates += recipe.chunk
        if position.learned_at is None and progress.nats_per_bit < recipe.learned_below and position.difficulty >= 1:
            position.learned_at = position.step
        self._grow(progress)
        validation = None
        if position.learned_at is not None and (position.step - position.learned_at) % recipe.validate_every == 0:
            validation = self._validate()
        self._report(progress, validation)
        if not position.finished and self._given_up(progress):
            self._next_attempt()
        save_checkpoint(self.run_dir, Checkpoint(dataclasses.asdict(position), self.trainer.variables))

    def _given_up(self, progress: Progress) -> bool:
        """Whether this attempt is over: not a number, not learned in time, or settled without success."""
        position, recipe = self.position, self.recipe
        if not math.isfinite(progress.nats_per_bit):
            return True
        if position.learned_at is None:
            return position.step >= recipe.search_steps
        return position.step - position.learned_at >= recipe.settle_steps

    def _next_attempt(self) -> None:
        """Starts from other random weights, or ends the run if there were enough."""
        position = self.position
        if position.attempt + 1 >= self.recipe.attempts:
            position.finished = True
            return
        position.attempt += 1
        position.step, position.learned_at, position.faultless = 0, None, 0
        position.difficulty = self._first_difficulty()
        self.trainer.restart(self._build(position.attempt, small=True))

    def _validate(self) -> float:
        """Measures the averaged weights in the full memory; keeps them if they are the best so far."""
        for variable, value in zip(self.kept.trainable_variables, self.trainer.average, strict=True):
            variable.assign(value)
        answers = self.evaluator.answer(self.validation)
        wrong, loss = float(answers.wrong_bits.mean()), float(answers.loss_bits.mean())
        if (wrong, loss) < (self.position.best, self.position.best_loss):
            self._keep(wrong, loss)
        # With noise a network may pass by luck and go astray in the next update: only what is settled counts.
        position = self.position
        position.faultless = position.faultless + 1 if wrong == 0 and not self._rates().noise else 0
        if position.faultless >= self.recipe.faultless_validations and self._examine():
            self._keep(wrong, loss)
            position.solved = position.finished = True
        return wrong

    def _examine(self) -> bool:
        """A last look at many more sequences, for faults too rare to be in the validation."""
        generator = np.random.default_rng([self.config.seed, _EXAMINATION, self.position.updates])
        for _ in range(math.ceil(self.recipe.examination_size / self.recipe.validation_size)):
            batch = self.task.validation_batch(generator, self.recipe.validation_size)
            if self.evaluator.answer(batch).wrong_bits.any():
                return False
        return True

    def _keep(self, wrong: float, loss: float) -> None:
        """The evaluated weights are the best so far."""
        self.position.best, self.position.best_loss = wrong, loss
        _save_model(self.kept, self.run_dir / "best.keras")

    def _grow(self, progress: Progress) -> None:
        """Draws larger sequences once the present ones are answered well."""
        if self.recipe.curriculum and progress.nats_per_bit < 3 * self.recipe.learned_below:
            self.position.difficulty = min(1.0, self.position.difficulty * 1.5)

    def _first_difficulty(self) -> float:
        return 0.25 if self.recipe.curriculum else 1.0

    def _rates(self) -> Rates:
        """The schedule: constant in the search; a falling rate, less clipping room and noise while settling."""
        recipe, position = self.recipe, self.position
        if position.learned_at is None:
            return Rates(recipe.learning_rate, recipe.clip_norm, 0.0)
        part = min(1.0, (position.step - position.learned_at) / recipe.settle_steps)
        noise = recipe.settle_noise if part < 0.6 else 0.0
        cosine = 0.5 * (1 + math.cos(math.pi * part))
        return Rates(recipe.settle_rate * (0.05 + 0.95 * cosine), recipe.settle_clip_norm, noise)

    def _batches(self) -> list[Batch]:
        """The next chunk's; they follow from the seed, the attempt and the step alone."""
        position, recipe = self.position, self.recipe
        generator = np.random.default_rng([self.config.seed, _DATA, position.attempt, position.step])
        return [
            self.task.training_batch(generator, recipe.batch_size, position.difficulty) for _ in range(recipe.chunk)
        ]

    def _build(self, attempt: int, *, small: bool) -> keras.Sequential:
        """The network of an attempt: with the memory of the training, or the full one."""
        seed = int(np.random.default_rng([self.config.seed, _WEIGHTS, attempt]).integers(2**31))
        return build_model(
            self.config.model,
            self.task.input_dim,
            self.task.output_dim,
            seed=seed,
            slots=self.recipe.training_slots if small else None,
            noise=self.noise if small else 0.0,
        )

    def _begin(self) -> Position:
        """Where the run in the directory stands; a new run starts at the beginning."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        found = load_checkpoint(self.run_dir, self.config, self.trainer.variables)
        if found is None:
            self.config.save(self.run_dir)
            return Position(difficulty=self._first_difficulty())
        position = Position(**found)
        self._forget_metrics_after(position.updates)
        return position

    def _forget_metrics_after(self, updates: int) -> None:
        """Drops lines that were written after the last checkpoint: their updates are made again."""
        path = self.run_dir / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n") and json.loads(line)["updates"] <= updates]
        path.write_text("".join(whole))

    def _load_best(self) -> None:
        """The kept network is the best validated, or the last average if nothing was validated."""
        path = self.run_dir / "best.keras"
        values = keras.saving.load_model(path).trainable_variables if path.exists() else self.trainer.average
        for variable, value in zip(self.kept.trainable_variables, values, strict=True):
            variable.assign(value)
        if not path.exists():
            _save_model(self.kept, path)

    def _report(self, progress: Progress, validation: float | None) -> None:
        """One line of JSON, and the caller's own look."""
        position = self.position
        report = Report(
            position=dataclasses.replace(position),
            progress=progress,
            sequences=position.updates * self.recipe.batch_size,
            seconds=time.monotonic() - self.began,
            validation=validation,
        )
        line: dict[str, Any] = {"attempt": position.attempt, "step": position.step, "updates": position.updates}
        line |= {"sequences": report.sequences, "seconds": round(report.seconds, 3), "validation": validation}
        line |= {"learned": position.learned_at is not None, **progress._asdict()}
        with (self.run_dir / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")
        if self.on_report is not None:
            self.on_report(report)


def _save_model(model: keras.Sequential, path: Path) -> None:
    """Whole or not at all."""
    partial = path.with_name(f"partial-{path.name}")
    model.save(partial)
    partial.replace(path)
