"""What a run is: frozen values, checked before anything is trained, and written beside the run as JSON."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from training.checks import ConfigError, expect, expect_integers, is_number
from training.tasks import TASKS, Task, make_task

MODELS = ("ntm", "ntm-double-dense", "ntm-lstm", "lstm", "lstm-stack", "dense")
# Those without a memory to search for.
BASELINES = ("lstm", "lstm-stack", "dense")

# Fields of `Recipe` with the same range.
_COUNTS = (
    *("batch_size", "search_steps", "settle_steps", "attempts"),
    *("chunk", "validate_every", "validation_size", "faultless_validations"),
    *("examination_size", "training_examination_size"),
)
_POSITIVE = ("learning_rate", "settle_rate", "epsilon", "clip_norm", "settle_clip_norm", "learned_below")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The network.

    Attributes:
        kind: "ntm" (a hidden tanh layer as the controller), "ntm-double-dense" (two of them), "ntm-lstm"; or without
            memory "lstm" (the paper's baseline: layers of LSTM, read by a dense one), "lstm-stack" (its last layer is
            an LSTM as wide as the output) and "dense" (nothing is remembered at all).
        units: of the controller, or of each layer of the baseline.
        layers: of the baseline.
        n_slots: of the memory.
        m_depth: values in a slot.
        shift_range: shifts a head chooses from.
        heads: read heads, and as many write heads.
    """

    kind: str = "ntm"
    units: int = 100
    layers: int = 3
    n_slots: int = 128
    m_depth: int = 20
    shift_range: int = 3
    heads: int = 1

    def __post_init__(self) -> None:
        expect(self.kind in MODELS, "model kind", f"one of {', '.join(MODELS)}", self.kind)
        expect_integers(self, ("units", "layers", "n_slots", "m_depth", "shift_range", "heads"))
        expect(self.shift_range <= self.n_slots, "shift_range", "at most n_slots", self.shift_range)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained: a search at a high rate, and once the task is learned, settling at a falling one.

    Attributes:
        batch_size: sequences in an update.
        training_slots: slots of the memory in the search; None for the model's own. No weight depends on them, and in
            a memory that is barely large enough a network has to learn not to overwrite what it still needs. It
            settles in the full memory, because more slots take more of the weight of what is looked up by content.
        learning_rate: Adam's, in the search.
        beta_2: Adam's.
        epsilon: Adam's. A large one keeps updates small when gradients are.
        clip_norm: of the global norm of the gradient, in the search.
        learned_below: the search ends when the mean loss of ``chunk`` steps, in nats a bit, is below this.
        search_steps: an attempt that has not learned by then is given up.
        settle_steps: over which the rate falls, once learned.
        settle_rate: the rate at which settling begins; it ends at a twentieth of that.
        settle_clip_norm: the global norm while settling.
        settle_noise: deviation of the noise on the NTM's head parameters in the first three fifths of settling: it
            pushes gates and shifts to their ends, so that the focus does not drift in long sequences.
        average: decay of the running average of the weights, which is what is measured and kept.
        attempts: networks that may be started, each from other random weights.
        chunk: updates between two looks at the loss.
        validate_every: updates between two validations while settling.
        validation_size: sequences in a validation.
        faultless_validations: the run is solved when so many validations in a row had no wrong bit, with
            the noise off.
        examination_size: further sequences like those of the validation that a solved network has to answer without a
            wrong bit.
        training_examination_size: and test sequences of the trained sizes: more, since they are shorter.
        compiled: whether XLA compiles the updates: seconds at the start, and many times faster after.
        curriculum: True: the sizes drawn grow with the success; False: the whole range from the start.
    """

    batch_size: int = 4
    training_slots: int | None = 22
    learning_rate: float = 4e-3
    beta_2: float = 0.99
    epsilon: float = 1e-3
    clip_norm: float = 10.0
    learned_below: float = 0.03
    search_steps: int = 600
    settle_steps: int = 1000
    settle_rate: float = 1e-3
    settle_clip_norm: float = 1.0
    settle_noise: float = 0.6
    average: float = 0.99
    attempts: int = 10
    chunk: int = 50
    validate_every: int = 100
    validation_size: int = 192
    faultless_validations: int = 2
    examination_size: int = 4096
    training_examination_size: int = 24576
    compiled: bool = True
    curriculum: bool = False

    def __post_init__(self) -> None:
        expect_integers(self, _COUNTS)
        for name in (*_POSITIVE, "beta_2", "average", "settle_noise"):
            expect(is_number(getattr(self, name)), name, "a number", getattr(self, name))
        for name in _POSITIVE:
            expect(getattr(self, name) > 0, name, "above 0", getattr(self, name))
        for name in ("beta_2", "average"):
            expect(0 <= getattr(self, name) < 1, name, "at least 0 and below 1", getattr(self, name))
        expect(self.settle_noise >= 0, "settle_noise", "at least 0", self.settle_noise)
        expect(self.validate_every % self.chunk == 0, "validate_every", "a multiple of chunk", self.validate_every)
        if self.training_slots is not None:
            expect_integers(self, ("training_slots",), least=2)
        for name in ("compiled", "curriculum"):
            expect(isinstance(getattr(self, name), bool), name, "True or False", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: a task, a network, a recipe and a seed.

    Attributes:
        task: a name out of `training.tasks.TASKS`.
        task_options: fields of the task that differ from its defaults.
        model: the network.
        recipe: how it is trained.
        seed: of the weights, the data and the noise.
    """

    task: str = "copy"
    task_options: dict[str, Any] = field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    recipe: Recipe = Recipe()
    seed: int = 0

    def __post_init__(self) -> None:
        expect(self.task in TASKS, "task", f"one of {', '.join(TASKS)}", self.task)
        expect(type(self.seed) is int and 0 <= self.seed < 2**31, "seed", "between 0 and 2**31 - 1", self.seed)
        known = {f.name for f in dataclasses.fields(TASKS[self.task])}
        unknown = sorted(set(self.task_options) - known)
        expect(not unknown, f"options of the task {self.task}", f"out of {sorted(known)}", unknown)
        self.make_task()  # Which refuses an option out of range.

    def make_task(self) -> Task:
        """The task, with its options."""
        return make_task(self.task, **self.task_options)

    def to_json(self) -> str:
        """Everything, so that `from_json` gives an equal value."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "RunConfig":
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it is not such a text, or a value is out of range.
        """
        try:
            values = json.loads(text)
            model, recipe = ModelConfig(**values.pop("model")), Recipe(**values.pop("recipe"))
            return cls(**values, model=model, recipe=recipe)
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ConfigError(f"expected the configuration of a run as JSON; {error}") from error

    def save(self, run_dir: Path) -> None:
        """Writes ``config.json`` into the run's directory."""
        (run_dir / "config.json").write_text(self.to_json())

    @classmethod
    def load(cls, run_dir: Path) -> "RunConfig":
        """Reads ``config.json`` of a run.

        Raises:
            ConfigError: the directory holds no run, or not a readable one.
        """
        path = run_dir / "config.json"
        if not path.is_file():
            raise ConfigError(f"expected the directory of a run, with a config.json in it; received {run_dir}")
        return cls.from_json(path.read_text())
