"""Named recipes. `quick` is the fastest known here; `paper` has the sizes and the rates of Graves et al. (2014)."""

from typing import Any

from training.config import ModelConfig, Recipe, RunConfig

PRESETS = ("quick", "paper")

# Long sequences and no memory to search for: larger batches, one network, the full range of sizes.
_LSTM: dict[str, Any] = {
    "training_slots": None,
    "batch_size": 32,
    "learning_rate": 1e-3,
    "epsilon": 1e-7,
    "beta_2": 0.999,
    "search_steps": 6000,
    "settle_steps": 1000,
    "settle_noise": 0.0,
    "attempts": 1,
}
# Section 4.6 of the paper trains with RMSProp and momentum; the rate and the sizes are its, the optimizer is Adam.
_PAPER: dict[str, Any] = {
    "training_slots": None,
    "learning_rate": 1e-4,
    "settle_rate": 1e-4,
    "epsilon": 1e-7,
    "search_steps": 100_000,
    "settle_steps": 20_000,
    "settle_noise": 0.0,
    "attempts": 1,
}


def preset(name: str, *, task: str = "copy", model: str = "ntm", seed: int = 0) -> RunConfig:
    """The configuration of that name for a task and a kind of model.

    Raises:
        ConfigError: there is no such task or model, or the seed is out of range.
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset should be one of {', '.join(PRESETS)}; received {name!r}")
    recipe = Recipe(**(_PAPER if name == "paper" else _LSTM if model == "lstm" else {}))
    units = 256 if model == "lstm" else 100
    return RunConfig(task=task, model=ModelConfig(kind=model, units=units), recipe=recipe, seed=seed)
