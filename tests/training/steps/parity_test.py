"""The same updates on every backend, and on several devices: the same loss, weights and averages."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training import backends
from tests.training.steps import parity
from training.checks import ConfigError
from training.steps import devices


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("parity") / "start.npz"
    np.savez(path, *parity.first_weights())
    return path


@pytest.fixture(scope="module")
def reference(start):
    with np.load(start) as found:
        return parity.run([found[name] for name in found.files])


def elsewhere(python, backend, count, start, output, noise=0.0):
    command = [python, parity.__file__, start, output, str(count), str(noise)]
    environment = backends.environment(backend, count)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(output) as found:
        return dict(found)


def assert_same(came, reference, tolerance=2e-6):
    assert came.keys() == reference.keys()
    for name, values in reference.items():
        np.testing.assert_allclose(came[name], values, rtol=1e-5, atol=tolerance, err_msg=name)


def test_the_updates_do_something(start, reference):
    with np.load(start) as found:
        moved = [np.abs(reference[f"weight {i}"] - found[name]).max() for i, name in enumerate(found.files)]
    assert min(moved) > 1e-3


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_another_backend_gives_the_same(backend, start, reference, tmp_path):
    came = elsewhere(backends.python_with(backend), backend, 1, start, tmp_path / "out.npz")
    assert_same(came, reference)


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_two_devices_give_the_same_as_one(backend, start, reference, tmp_path):
    python = Path(sys.executable) if backend == "tensorflow" else backends.python_with(backend)
    assert_same(elsewhere(python, backend, 2, start, tmp_path / "out.npz"), reference)


def test_two_devices_of_jax_draw_noise_of_their_own(start, tmp_path):
    python = backends.python_with("jax")
    one, two = (elsewhere(python, "jax", count, start, tmp_path / f"{count}.npz", noise=0.5) for count in (1, 2))
    # The rows are the same on both devices: with the same noise, their mean would be that of the one device.
    assert max(np.abs(two[name] - one[name]).max() for name in one if name.startswith("weight")) > 1e-3


def test_a_batch_that_cannot_be_shared_out_is_refused(monkeypatch):
    monkeypatch.setattr(devices, "_of_tensorflow", lambda: devices.Devices(None, 3))
    with pytest.raises(ConfigError, match=r"batch_size should be a multiple of the 3 devices; received 4"):
        devices.all_devices(4)


def test_pytorch_is_refused(monkeypatch):
    monkeypatch.setattr(devices.keras.backend, "backend", lambda: "torch")
    with pytest.raises(ConfigError, match="it is 'torch' now"):
        devices.all_devices(4)
