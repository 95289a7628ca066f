"""Fields of a configuration, set one by one: ``task.max_length=10``, ``model.units=256``, ``recipe.batch_size=8``."""

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

from training.checks import ConfigError
from training.config import RunConfig

_GROUPS = ("task", "model", "recipe")


def with_settings(config: RunConfig, settings: Sequence[str]) -> RunConfig:
    """The configuration with these fields changed.

    Args:
        config: what is changed.
        settings: each "GROUP.FIELD=VALUE", the value in JSON.

    Raises:
        ConfigError: one has not that form, there is no such field, or the value is out of range.
    """
    changes: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for setting in settings:
        group, name, value = _parsed(setting)
        changes[group][name] = value
    return dataclasses.replace(
        config,
        task_options={**config.task_options, **changes["task"]},
        model=_replaced(config.model, "model", changes["model"]),
        recipe=_replaced(config.recipe, "recipe", changes["recipe"]),
    )


def _parsed(setting: str) -> tuple[str, str, Any]:
    """Group, field and value."""
    name, equals, value = setting.partition("=")
    group, dot, field = name.partition(".")
    if not (equals and dot and field and group in _GROUPS):
        raise ConfigError(f"--set should be GROUP.FIELD=VALUE, GROUP one of {', '.join(_GROUPS)}; received {setting!r}")
    try:
        return group, field, json.loads(value)
    except json.JSONDecodeError as error:
        raise ConfigError(f"the value of {name} should be a number, true, false or null; received {value!r}") from error


def _replaced(part: Any, group: str, changes: dict[str, Any]) -> Any:
    """A part of the configuration with these fields changed."""
    known = {field.name for field in dataclasses.fields(part)}
    if unknown := sorted(set(changes) - known):
        raise ConfigError(f"fields of {group} should be out of {sorted(known)}; received {unknown}")
    return dataclasses.replace(part, **changes)
