import pytest

from training.checks import ConfigError
from training.presets import preset
from training.settings import with_settings


def test_fields_of_each_part_are_set_and_nothing_else_is():
    config = preset("quick", task="copy", seed=3)
    settings = ["task.max_length=5", "task.blank=0.25", "model.units=7", "recipe.training_slots=null"]
    found = with_settings(config, [*settings, "recipe.compiled=false"])
    assert found.task_options == {"max_length": 5, "blank": 0.25}
    assert found.make_task().max_time == 12
    assert (found.model.units, found.recipe.training_slots, found.recipe.compiled) == (7, None, False)
    assert with_settings(
        found, ["model.units=100", "recipe.training_slots=22", "recipe.compiled=true"]
    ) == with_settings(config, settings[:2])


def test_no_settings_change_nothing():
    config = preset("quick", task="ngrams")
    assert with_settings(config, []) == config


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("units=7", r"--set should be GROUP.FIELD=VALUE, GROUP one of task, model, recipe; received 'units=7'"),
        ("model.units", "--set should be"),
        ("trainer.units=7", "--set should be"),
        ("model.=7", "--set should be"),
        ("model.units=seven", "the value of model.units should be a number, .*; received 'seven'"),
        ("model.slots=7", r"fields of model should be out of \['heads'.*; received \['slots'\]"),
        ("model.units=0", "units should be an integer of at least 1; received 0"),
        ("task.lenght=7", "options of the task copy should be out of"),
        ("task.bits=0", "bits should be an integer of at least 1; received 0"),
        ("task.max_length=-3", "max_length should be an integer of at least 1; received -3"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(setting, text):
    with pytest.raises(ConfigError, match=text):
        with_settings(preset("quick"), [setting])
