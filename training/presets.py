"""Named recipes. `quick` is the fastest known here; `paper` has the sizes and the rates of Graves et al. (2014)."""

from typing import Any

from training.checks import ConfigError
from training.config import BASELINES, ModelConfig, Recipe, RunConfig
from training.tasks import TASKS

PRESETS = ("quick", "paper")

# What the other tasks change of the recipe for copy, which is the default of every field. They find their place in the
# memory by content, and how much weight leaks to slots that hold nothing depends on how many there are: they train with
# the full memory. Their heads need no noise to hold their focus over a hundred steps.
_BY_CONTENT: dict[str, Any] = {"training_slots": None, "settle_noise": 0.0, "attempts": 3}
_TASKS: dict[str, dict[str, Any]] = {
    "copy": {},
    "repeat-copy": {
        **_BY_CONTENT,
        "batch_size": 8,
        "learned_below": 0.003,
        "search_steps": 8000,
        "settle_steps": 6000,
        "settle_rate": 2e-3,
        "validate_every": 500,
    },
    "associative-recall": {
        **_BY_CONTENT,
        "batch_size": 16,
        "learned_below": 0.01,
        "search_steps": 3000,
        "settle_steps": 2000,
        "validate_every": 250,
    },
}
# One phase, since nothing is found all at once: a rate that falls over a stated number of updates.
_ONE_PHASE: dict[str, Any] = {
    **_BY_CONTENT,
    "attempts": 1,
    "batch_size": 8,
    "learned_below": 100.0,
    "epsilon": 1e-7,
    "beta_2": 0.999,
    "validate_every": 500,
    "validation_size": 256,
    "settle_steps": 8000,
}
_TASKS |= {"ngrams": _ONE_PHASE, "priority-sort": {**_ONE_PHASE, "batch_size": 16}}
# The baselines: nothing is found all at once either, but short sequences first make long ones easier.
_BASELINE: dict[str, Any] = {
    "training_slots": None,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "epsilon": 1e-7,
    "beta_2": 0.999,
    "clip_norm": 1.0,
    "learned_below": 0.06,
    "search_steps": 20_000,
    "settle_steps": 2500,
    "settle_noise": 0.0,
    "attempts": 1,
    "curriculum": True,
    "validate_every": 500,
}
# Section 4.6 of the paper trains with RMSProp and momentum; the rate and the sizes are its, the optimizer is Adam.
_PAPER: dict[str, Any] = {
    "training_slots": None,
    "epsilon": 1e-7,
    "search_steps": 100_000,
    "settle_steps": 20_000,
    "settle_noise": 0.0,
    "attempts": 1,
}
_PAPER_RATES = {"ngrams": 3e-5, "priority-sort": 3e-5}
# Tables 1 to 3 of the paper: heads and units of the NTM with a dense and with an LSTM controller; the baseline's units.
_PAPER_SIZES = {
    "copy": ((1, 100), (1, 100), 256),
    "repeat-copy": ((1, 100), (1, 100), 512),
    "associative-recall": ((4, 256), (1, 100), 256),
    "ngrams": ((1, 100), (1, 100), 128),
    "priority-sort": ((8, 512), (5, 100), 128),
}


def preset(name: str, *, task: str = "copy", model: str = "ntm", seed: int = 0) -> RunConfig:
    """The configuration of that name for a task and a kind of model.

    Raises:
        ConfigError: there is no such task or model, or the seed is out of range.
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset should be one of {', '.join(PRESETS)}; received {name!r}")
    if task not in TASKS:
        raise ConfigError(f"task should be one of {', '.join(TASKS)}; received {task!r}")
    if name == "paper":
        rate = _PAPER_RATES.get(task, 1e-4)
        recipe = Recipe(**_PAPER, learning_rate=rate, settle_rate=rate)
    else:
        recipe = Recipe(**(_BASELINE if model in BASELINES else _TASKS[task]))
    return RunConfig(task=task, model=_model(task, model), recipe=recipe, seed=seed)


def _model(task: str, kind: str) -> ModelConfig:
    """The network of the paper for that task."""
    dense, lstm, units = _PAPER_SIZES[task]
    if kind in BASELINES:
        return ModelConfig(kind=kind, units=units)
    heads, units = lstm if kind == "ntm-lstm" else dense
    return ModelConfig(kind=kind, units=units, heads=heads)
