"""The one function that trains: search for a network that learns, settle it, check it, keep it."""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import keras
import numpy as np

from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from training.config import RunConfig
from training.evaluation import Evaluator, shortfall, trained_sizes
from training.log import RunLog
from training.models import build_model
from training.reports import Position, Report, Result
from training.results import Row
from training.step import Progress, Rates, Trainer
from training.steps.devices import Devices, all_devices
from training.tasks import Batch, trimmed

# Streams of random numbers that must not meet.
_DATA, _VALIDATION, _WEIGHTS, _EXAMINATION = 1, 2, 3, 4
# The part of the settling that has noise.
_NOISY = 0.6


def train_and_evaluate(
    config: RunConfig,
    run_dir: Path | str,
    *,
    on_report: Callable[[Report], None] | None = None,
    max_updates: int | None = None,
    test_sequences: int = 0,
    data_parallel: bool = False,
) -> Result:
    """Trains one network, or resumes the run that the directory holds, and leaves there all that belongs to it.

    In ``run_dir``: ``config.json``, ``metrics.jsonl`` and TensorBoard's events, ``checkpoint.npz`` (where the run
    stands, to resume), ``best.keras`` (the best validated network), ``last.keras`` (the network at the end) and
    ``result.json``.

    Args:
        config: the run.
        run_dir: made if missing. If it holds a run, that must be of an equal config.
        on_report: called after each chunk of updates.
        max_updates: stop there, resumable; None goes on to the end.
        test_sequences: measure so many at each test size for each report; 0 for none.
        data_parallel: spread every batch over all devices (docs/training.md).

    Raises:
        ConfigError: the directory holds a run of another config, or the batch cannot be spread.
    """
    devices = all_devices(config.recipe.batch_size) if data_parallel else None
    run = _Run(config, Path(run_dir), devices, on_report, test_sequences)
    try:
        return run.go(max_updates)
    finally:
        run.close()


class _Run:
    """The state of one call of `train_and_evaluate`."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        devices: Devices | None,
        on_report: Callable[[Report], None] | None,
        test_sequences: int,
    ) -> None:
        self.began = time.monotonic()
        self.config, self.recipe, self.run_dir, self.on_report = config, config.recipe, run_dir, on_report
        self.test_sequences = test_sequences
        self.writes = devices is None or devices.writes
        self.task = config.make_task()
        # Not every task has them: what a network that has learned the task still fails in.
        self.hard_batch: Callable[[np.random.Generator, int], Batch] | None = getattr(self.task, "hard_batch", None)
        with devices.scope() if devices else nullcontext():
            self.noise = keras.Variable(0.0, trainable=False, name="head_parameter_noise")
            spread = devices.spread if devices else None
            self.searcher = Trainer(self._build(0, small=True), self.recipe, self.noise, spread=spread)
            self.settler = Trainer(self._build(0, small=False), self.recipe, self.noise, spread=spread)
        self.kept = self._build(0, small=False, noisy=False)
        self.best: list[Any] | None = None
        self.evaluator = Evaluator(self.kept, compiled=self.recipe.compiled)
        self.tester = Evaluator(self.kept, compiled=False)
        self.validation = self.task.validation_batch(
            np.random.default_rng([config.seed, _VALIDATION]), self.recipe.validation_size
        )
        self.position = self._begin()
        self.log = RunLog(run_dir, self.position.updates) if self.writes else None

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
            spoilt=self.position.spoilt,
        )
        if self.writes:
            (self.run_dir / "result.json").write_text(json.dumps(result.summary(), indent=2) + "\n")
        return result

    @property
    def trainer(self) -> Trainer:
        """A network is searched for in the small memory; once it has learned the task it settles in the full one."""
        return self.searcher if self.position.learned_at is None else self.settler

    def close(self) -> None:
        """Ends the log."""
        if self.log is not None:
            self.log.close()

    def _advance(self, progress: Progress) -> None:
        """Books a chunk: learned? validated? stuck? Then reports, and saves where the run stands."""
        position, recipe = self.position, self.recipe
        if not (math.isfinite(progress.nats_per_bit) and self.trainer.finite):
            self._spoilt(progress)
            return
        position.step += recipe.chunk
        position.updates += recipe.chunk
        if position.learned_at is None and progress.nats_per_bit < recipe.learned_below and position.difficulty >= 1:
            position.learned_at = position.step
            self.settler.take(self.searcher)
        self._grow(progress)
        validation = None
        if position.learned_at is not None and (position.step - position.learned_at) % recipe.validate_every == 0:
            validation = self._validate()
        self._report(progress, validation)
        if not position.finished and self._given_up():
            self._next_attempt()
        self._save()

    def _spoilt(self, progress: Progress) -> None:
        """Goes back to the last checkpoint, whose weights are numbers, and gives this network up."""
        found = load_checkpoint(self.run_dir, self.config, self.trainer.variables)
        if found is None:
            self.searcher.restart(self._build(0, small=True))
        self.position = Position(**found) if found else Position(difficulty=self._first_difficulty())
        self.position.spoilt += 1
        self._next_attempt()
        self._report(progress, None)
        self._save()

    def _save(self) -> None:
        """Where the run stands, on disk."""
        if self.writes:
            save_checkpoint(self.run_dir, Checkpoint(dataclasses.asdict(self.position), self.trainer.variables))

    def _given_up(self) -> bool:
        """Whether this attempt is over: not learned in time, or settled without success."""
        position, recipe = self.position, self.recipe
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
        self.searcher.restart(self._build(position.attempt, small=True))

    def _validate(self) -> float:
        """Measures the averaged weights in the full memory; keeps them if they are the best so far."""
        self._assign(self.trainer.average)
        answers = self.evaluator.answer(self.validation)
        wrong, loss = shortfall(self.task, self.validation, answers), float(answers.loss_bits.mean())
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
        return not any(shortfall(self.task, batch, self.evaluator.answer(batch)) for batch in self._examination())

    def _examination(self) -> Iterator[Batch]:
        """Sequences of the trained sizes, then such as are in the validation."""
        generator = np.random.default_rng([self.config.seed, _EXAMINATION, self.position.updates])
        yield trained_sizes(self.task, generator, self.recipe.training_examination_size)
        yield self.task.validation_batch(generator, self.recipe.examination_size)

    def _keep(self, wrong: float, loss: float) -> None:
        """The evaluated weights are the best so far."""
        self.position.best, self.position.best_loss = wrong, loss
        self.best = self.trainer.average
        self._write_model("best.keras")

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
        noise = recipe.settle_noise if part < _NOISY else 0.0
        cosine = 0.5 * (1 + math.cos(math.pi * part))
        return Rates(recipe.settle_rate * (0.05 + 0.95 * cosine), recipe.settle_clip_norm, noise)

    def _batches(self) -> list[Batch]:
        """The next chunk's; they follow from the seed, the attempt and the step alone."""
        position, recipe = self.position, self.recipe
        generator = np.random.default_rng([self.config.seed, _DATA, position.attempt, position.step])
        if position.learned_at is not None and self.hard_batch is not None:
            return [self.hard_batch(generator, recipe.batch_size) for _ in range(recipe.chunk)]
        batches = [
            self.task.training_batch(generator, recipe.batch_size, position.difficulty) for _ in range(recipe.chunk)
        ]
        return batches if position.difficulty >= 1 else trimmed(batches)

    def _build(self, attempt: int, *, small: bool, noisy: bool = True) -> keras.Sequential:
        """The network of an attempt: with the memory of the search, or the full one."""
        seed = int(np.random.default_rng([self.config.seed, _WEIGHTS, attempt]).integers(2**31))
        return build_model(
            self.config.model,
            self.task.input_dim,
            self.task.output_dim,
            seed=seed,
            slots=self.recipe.training_slots if small else None,
            noise=self.noise if noisy else 0.0,
        )

    def _begin(self) -> Position:
        """Where the run in the directory stands; a new run starts at the beginning."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        found = load_checkpoint(self.run_dir, self.config, self.searcher.variables)
        if found is not None:
            self.settler.take(self.searcher)
            return Position(**found)
        if self.writes:
            self.config.save(self.run_dir)
        return Position(difficulty=self._first_difficulty())

    def _load_best(self) -> None:
        """The kept network is the best validated, or the last average if nothing was validated.

        A call that was stopped before the first validation leaves its average as ``best.keras`` too, which is none.
        """
        self._assign(self.trainer.average)
        self._write_model("last.keras")
        path = self.run_dir / "best.keras"
        if self.best is not None:
            self._assign(self.best)
        elif math.isfinite(self.position.best) and path.exists():
            self._assign(keras.saving.load_model(path).trainable_variables)
        else:
            self._write_model("best.keras")

    def _assign(self, values: Sequence[Any]) -> None:
        """Puts weights into the network with the full memory."""
        for variable, value in zip(self.kept.trainable_variables, values, strict=True):
            variable.assign(value)

    def _write_model(self, name: str) -> None:
        """The network with the full memory as a file, whole or not at all."""
        if self.writes:
            partial = self.run_dir / f"partial-{name}"
            self.kept.save(partial)
            partial.replace(self.run_dir / name)

    def _report(self, progress: Progress, validation: float | None) -> None:
        """A line in the log, and the caller's own look."""
        report = Report(
            position=dataclasses.replace(self.position),
            progress=progress,
            sequences=self.position.updates * self.recipe.batch_size,
            seconds=time.monotonic() - self.began,
            validation=validation,
            table=self._test(),
        )
        if self.log is not None:
            self.log.write(report)
        if self.on_report is not None:
            self.on_report(report)

    def _test(self) -> tuple[Row, ...]:
        """The averaged weights at each test size, where that was asked for."""
        if not self.test_sequences:
            return ()
        self._assign(self.trainer.average)
        return tuple(self.tester.table(self.task, sequences=self.test_sequences, seed=self.config.seed))
