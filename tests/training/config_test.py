import dataclasses

import pytest

from training.config import ConfigError, ModelConfig, Recipe, RunConfig
from training.presets import PRESETS, preset
from training.tasks import TASKS


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: RunConfig(task="sort"), "task should be one of copy"),
        (lambda: RunConfig(seed=-1), "seed should be between"),
        (lambda: RunConfig(task_options={"lenght": 3}), "lenght"),
        (lambda: ModelConfig(kind="gru"), "one of ntm, .*, dense; received 'gru'"),
        (lambda: ModelConfig(n_slots=0), "n_slots should be an integer of at least 1; received 0"),
        (lambda: ModelConfig(n_slots=2), "shift_range should be at most n_slots; received 3"),
        (lambda: Recipe(batch_size=0), "batch_size"),
        (lambda: Recipe(learning_rate=0.0), "learning_rate should be above 0; received 0.0"),
        (lambda: Recipe(average=1.0), "average should be at least 0 and below 1"),
        (lambda: Recipe(settle_noise=-1.0), "settle_noise"),
        (lambda: Recipe(chunk=50, validate_every=75), "validate_every should be a multiple of chunk; received 75"),
        (lambda: Recipe(training_slots=1), "training_slots should be at least 2"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("model", ["ntm", "ntm-lstm", "lstm"])
def test_every_preset_comes_back_from_its_json(name, task, model, tmp_path):
    config = preset(name, task=task, model=model, seed=7)
    assert (config.task, config.model.kind, config.seed) == (task, model, 7)
    config.save(tmp_path)
    assert RunConfig.load(tmp_path) == config


def test_no_run_and_broken_json_are_told(tmp_path):
    with pytest.raises(ConfigError, match="directory of a run"):
        RunConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="configuration of a run"):
        RunConfig.load(tmp_path)


def test_unknown_preset_is_refused():
    with pytest.raises(ValueError, match="one of quick, paper; received 'fast'"):
        preset("fast")


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        preset("quick").seed = 1
