"""Exports the network that a run has kept, in this process or, for a run of another backend, in one of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

from training.checks import ConfigError
from training.config import RunConfig
from training.exporting.publication import Target

_ROOT = Path(__file__).resolve().parents[2]


def export_run(run_dir: Path, target: Target) -> Path:
    """Exports ``best.keras`` of a run with all that is known of its training; Keras has to run on TensorFlow.

    Raises:
        ConfigError: the directory holds no trained network.
        ExportError, FileExistsError, ValueError: see `training.export.export_model`.
    """
    config = RunConfig.load(run_dir)
    if not (run_dir / "best.keras").is_file():
        raise ConfigError(f"expected a trained network, best.keras, in {run_dir}; it has none yet")
    # Imported late: a directory without a run is refused at once.
    import keras

    import ntm  # noqa: F401  the layer has to be registered before a model with it is loaded
    from training.export import export_model

    result = run_dir / "result.json"
    provenance = {"config": config.to_json(), **(json.loads(result.read_text()) if result.is_file() else {})}
    model = keras.saving.load_model(run_dir / "best.keras")
    return export_model(
        model, target.directory, name=target.name, version=target.version, task=config.task, provenance=provenance
    )


def export_under_tensorflow(run_dir: Path, target: Target) -> int:
    """The same in a process of its own, for a run that was trained on another backend. Returns its exit status."""
    version = [] if target.version is None else ["--version", str(target.version)]
    options = [str(run_dir.absolute()), "--export-dir", str(target.directory.absolute()), "--name", target.name]
    environment = {**os.environ, "KERAS_BACKEND": "tensorflow"}
    command = [sys.executable, "-m", "training.exporting", *options, *version]
    return subprocess.run(command, cwd=_ROOT, env=environment, check=False).returncode  # noqa: S603 - ourselves
