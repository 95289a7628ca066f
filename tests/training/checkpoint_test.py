import dataclasses
import shutil

import pytest

from training import command
from training.checkpoint import change_recipe
from training.checks import ConfigError
from training.config import RunConfig
from training.loop import train_and_evaluate


@pytest.fixture(scope="module")
def begun(tiny, tmp_path_factory):
    """The directory of a run that was stopped after four updates."""
    run_dir = tmp_path_factory.mktemp("begun")
    train_and_evaluate(tiny, run_dir, max_updates=4)
    return run_dir


@pytest.fixture
def run_dir(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def of_recipe(config, **changes):
    return dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, **changes))


def test_a_run_goes_on_under_another_recipe_and_keeps_the_former(tiny, run_dir):
    shorter = of_recipe(tiny, settle_steps=4, attempts=1)
    assert command.run_training(shorter, run_dir, target=None) == 2, "not unless it is asked for"
    assert command.run_training(shorter, run_dir, target=None, new_recipe=True) == 1
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3, "learned after two updates, then four to settle: two of them after the change"
    assert RunConfig.load(run_dir) == shorter
    assert RunConfig.from_json((run_dir / "config-until-4.json").read_text()) == tiny
    change_recipe(run_dir, shorter)  # which it has already
    assert len(list(run_dir.glob("config-until-*.json"))) == 1
    with pytest.raises(ConfigError, match="not over yet"):
        change_recipe(run_dir, tiny)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda config: dataclasses.replace(config, seed=9), "another task, network or seed"),
        (lambda config: of_recipe(config, batch_size=4), "batch_size of a run that goes on should be 2; received 4"),
    ],
)
def test_what_its_weights_or_its_count_of_sequences_hang_on_cannot_be_changed(tiny, run_dir, change, text):
    with pytest.raises(ConfigError, match=text):
        change_recipe(run_dir, change(tiny))
    assert RunConfig.load(run_dir) == tiny


def test_only_a_run_that_has_begun_can_be_changed(tiny, tmp_path):
    with pytest.raises(ConfigError, match="expected the directory of a run"):
        change_recipe(tmp_path, tiny)
    tiny.save(tmp_path)
    with pytest.raises(ConfigError, match="expected a run that has begun"):
        change_recipe(tmp_path, of_recipe(tiny, settle_steps=4))
