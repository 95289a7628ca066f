from pathlib import Path

import numpy as np
import pytest
from keras import ops

import ntm
from tests.training import zoo
from training.export import export_model


def test_load_gives_the_model_back_to_the_bit(tmp_path: Path) -> None:
    model = zoo.make("mixed-ntm-lstm")
    loaded = ntm.load(export_model(model, tmp_path, name="m"))
    assert loaded.to_json() == model.to_json()
    for came, wanted in zip(loaded.weights, model.weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(came), ops.convert_to_numpy(wanted))
    inputs = np.random.default_rng(0).normal(size=(2, 9, zoo.INPUT_DIM)).astype(np.float32)
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(inputs)), ops.convert_to_numpy(model(inputs)))
    assert not loaded.compiled


def test_load_takes_the_newest_version_of_a_model(tmp_path: Path) -> None:
    for version, seed in ((2, 0), (10, 1)):
        export_model(zoo.make("lstm", seed), tmp_path, name="m", version=version)
    newest = ntm.load(tmp_path / "m")
    np.testing.assert_array_equal(newest.weights[0].numpy(), zoo.make("lstm", 1).weights[0].numpy())


@pytest.mark.parametrize("make", [lambda path: None, Path.mkdir, lambda path: (path / "1").mkdir(parents=True)])
def test_load_says_what_it_looked_for(tmp_path: Path, make) -> None:
    make(tmp_path / "m")
    with pytest.raises(FileNotFoundError, match=r"assets.extra/model.keras"):
        ntm.load(tmp_path / "m")
