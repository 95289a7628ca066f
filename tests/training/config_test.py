import dataclasses

import pytest

from training.checks import ConfigError
from training.config import ModelConfig, Recipe, RunConfig
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
        (lambda: Recipe(training_slots=1), "training_slots should be an integer of at least 2; received 1"),
        (lambda: Recipe(batch_size=2.5), "batch_size should be an integer of at least 1; received 2.5"),
        (lambda: Recipe(learning_rate=float("nan")), "learning_rate should be a number; received nan"),
        (lambda: Recipe(compiled="no"), "compiled should be True or False; received 'no'"),
        (lambda: ModelConfig(units="100"), "units should be an integer of at least 1; received '100'"),
        (lambda: RunConfig(seed="1"), "seed should be between"),
    ],
)
def test_a_value_out_of_range_is_refused_with_what_was_expected(make, text):
    with pytest.raises(ConfigError, match=text):
        make()


@pytest.mark.parametrize(
    ("task", "options", "text"),
    [
        ("copy", {"bits": 0}, "bits should be an integer of at least 1; received 0"),
        ("copy", {"min_length": -1}, "min_length should be an integer of at least 1; received -1"),
        ("copy", {"max_length": 2.0}, "max_length should be an integer of at least 1; received 2.0"),
        ("copy", {"min_length": True}, "min_length should be an integer of at least 1; received True"),
        (
            "copy",
            {"min_length": 5, "max_length": 4},
            "max_length should be at least min_length, which is 5; received 4",
        ),
        ("copy", {"blank": 1.5}, "blank should be a number from 0 to 1; received 1.5"),
        ("copy", {"skewed": "much"}, "skewed should be a number from 0 to 1; received 'much'"),
        ("repeat-copy", {"max_repeats": 0}, "max_repeats should be an integer of at least 1; received 0"),
        ("repeat-copy", {"min_repeats": 11}, "max_repeats should be at least min_repeats, which is 11; received 10"),
        ("associative-recall", {"min_items": 1}, "min_items should be an integer of at least 2; received 1"),
        ("associative-recall", {"max_items": 1}, "max_items should be an integer of at least 2; received 1"),
        ("associative-recall", {"bits": 1}, "bits x item_length should be enough for 40 different items; received 3"),
        ("ngrams", {"length": -200}, "length should be an integer of at least 1; received -200"),
        ("ngrams", {"context": 40}, "context should be at most 16; received 40"),
        ("priority-sort", {"returned": 21}, "returned should be at most shown, 20; received 21"),
        ("priority-sort", {"shown": None}, "shown should be an integer of at least 1; received None"),
    ],
)
def test_an_option_of_a_task_out_of_range_is_refused_with_what_was_expected(task, options, text):
    with pytest.raises(ConfigError, match=text):
        RunConfig(task=task, task_options=options)


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
