"""Interpreters that have the other backends of Keras."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python_with(backend):
    """An interpreter that has a backend: this one, or the one that `make test-backends` keeps."""
    if importlib.util.find_spec(backend) is not None:
        return Path(sys.executable)
    other = ROOT / ".venv-backends" / "bin" / "python"
    if not other.exists():
        pytest.skip(f"{backend} is not installed, and make test-backends has not been run")
    return other


def environment(backend, devices=1):
    """For a process on a backend. PyTorch on every core would wait busily for the others."""
    places = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **places, "KERAS_BACKEND": backend}
