"""What a model says about itself: the JSON of its ``describe`` signature (docs/design.md, sequence model contract)."""

import json
import math
from typing import Any

from service.types import ModelVersion, StateComponent, VersionKey


class DescriptionError(Exception):
    """The text does not describe a sequence model."""


def parse_description(key: VersionKey, text: bytes | str) -> ModelVersion:
    """The version that a description stands for.

    Args:
        key: Which version it came from.
        text: The JSON.

    Raises:
        DescriptionError: a field is missing, or wrong.
    """
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise DescriptionError(f"its description is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise DescriptionError(f"its description is a JSON {type(fields).__name__}; expected an object")
    layout = tuple(_component(entry) for entry in _field(fields, "state_layout", list))
    state_size = _positive(fields, "state_size")
    _check_layout(layout, state_size)
    keras_config = fields.get("keras_config", "")
    return ModelVersion(
        key=key,
        fingerprint=_field(fields, "fingerprint", str),
        input_dim=_positive(fields, "input_dim"),
        output_dim=_positive(fields, "output_dim"),
        state_size=state_size,
        state_layout=layout,
        keras_config_json=keras_config if isinstance(keras_config, str) else json.dumps(keras_config),
        task=str(fields.get("task") or ""),
    )


def _check_layout(layout: tuple[StateComponent, ...], state_size: int) -> None:
    """Every element of the row belongs to one component."""
    end = 0
    for component in sorted(layout, key=lambda component: component.offset):
        if component.offset != end:
            raise DescriptionError(
                f"its state layout has {component.name} at offset {component.offset}; expected {end}"
            )
        end += math.prod(component.shape)
    if end != state_size:
        raise DescriptionError(f"its state layout has {end} elements; its state_size is {state_size}")


def _component(entry: Any) -> StateComponent:
    if not isinstance(entry, dict):
        raise DescriptionError(f"a component of its state layout is {entry!r}; expected an object")
    shape = _field(entry, "shape", list)
    if not all(isinstance(size, int) and size > 0 for size in shape):
        raise DescriptionError(f"a component of its state layout has shape {shape}")
    axes = entry.get("axes") or ()
    return StateComponent(
        _field(entry, "name", str), tuple(shape), _field(entry, "offset", int), tuple(str(axis) for axis in axes)
    )


def _positive(fields: dict[str, Any], name: str) -> int:
    value = _field(fields, name, int)
    if value < 1:
        raise DescriptionError(f"its {name} is {value}; expected 1 or more")
    return int(value)


def _field(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if not isinstance(value, kind) or isinstance(value, bool):
        raise DescriptionError(f"its description has {name} = {value!r}; expected {kind.__name__}")
    return value
