"""Where a run stands, on disk: written whole or not at all, so that a killed run goes on as if it had not been."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from training.checks import ConfigError
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
            f"{run_dir} holds a run of another configuration; choose another directory to start a new run"
        )
    with np.load(path) as saved:
        for index, variable in enumerate(variables):
            variable.assign(saved[f"v{index}"])
        position: dict[str, Any] = json.loads(str(saved["position"]))
    return position
