"""Where a run stands, on disk: written whole or not at all, so that a killed run goes on as if it had not been."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from training.checks import ConfigError, expect
from training.config import RunConfig

_FILE = "checkpoint.npz"


class Checkpoint(NamedTuple):
    """What `save_checkpoint` writes: the position as a dict, and every variable in a fixed order."""

    position: dict[str, Any]
    variables: Sequence[keras.Variable]


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Replaces the checkpoint of the run."""
    values = {f"v{i}": keras.ops.convert_to_numpy(v) for i, v in enumerate(checkpoint.variables)}
    partial = run_dir / f"partial-{_FILE}"
    np.savez(partial, position=json.dumps(checkpoint.position), **values)
    partial.replace(run_dir / _FILE)


def load_checkpoint(run_dir: Path, config: RunConfig, variables: Sequence[keras.Variable]) -> dict[str, Any] | None:
    """Puts the saved values into the variables and returns the position, or None where there is no checkpoint.

    Raises:
        ConfigError: the directory holds a run of another config.
    """
    path = run_dir / _FILE
    if not path.exists():
        return None
    if RunConfig.load(run_dir) != config:
        raise ConfigError(
            f"{run_dir} holds a run of another configuration; choose another directory to start a new run, or "
            "--new-recipe to go on with this one where only the recipe is another"
        )
    with np.load(path) as saved:
        for index, variable in enumerate(variables):
            variable.assign(saved[f"v{index}"])
        position: dict[str, Any] = json.loads(str(saved["position"]))
    return position


def change_recipe(run_dir: Path, config: RunConfig) -> None:
    """Lets the run in the directory go on under the recipe of ``config``.

    What it was trained under until then stays beside it, as ``config-until-UPDATES.json``.

    Raises:
        ConfigError: the directory holds no run that has begun and is not over, or one of another task, network, seed or
            batch size.
    """
    former = RunConfig.load(run_dir)
    if former == config:
        return
    if dataclasses.replace(former, recipe=config.recipe) != config:
        raise ConfigError(f"{run_dir} holds a run of another task, network or seed; only a recipe can be changed")
    size = former.recipe.batch_size
    expect(config.recipe.batch_size == size, "batch_size of a run that goes on", f"{size}", config.recipe.batch_size)
    path = run_dir / _FILE
    if not path.is_file():
        raise ConfigError(f"expected a run that has begun, with a {_FILE} in it; received {run_dir}")
    with np.load(path) as saved:
        position = json.loads(str(saved["position"]))
    if position["finished"]:
        raise ConfigError(f"expected a run that is not over yet; {run_dir} is after {position['updates']} updates")
    (run_dir / f"config-until-{position['updates']}.json").write_text(former.to_json())
    config.save(run_dir)
