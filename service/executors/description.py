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
    state_size = sum(math.prod(component.shape) for component in layout)
    if not layout or any(c.offset < 0 or c.offset + math.prod(c.shape) > state_size for c in layout):
        raise DescriptionError(f"its state layout does not fit a state of {state_size} elements")
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
