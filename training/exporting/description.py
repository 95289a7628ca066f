"""What an export says of itself: the state layout, the config that rebuilds the model, and the fingerprint."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from training.exporting.stages import Component, flat_layers


def describe(
    model: keras.Sequential,
    components: Sequence[Component],
    *,
    name: str,
    task: str,
    provenance: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The object that the ``describe`` signature returns as JSON.

    Args:
        model: The model.
        components: Its state, in the order of the row.
        name: The name that it is served under.
        task: What it was trained on; may be empty.
        provenance: How it was trained: anything that JSON holds.
    """
    layout = state_layout(components)
    config = keras_config(model)
    return {
        "model": name,
        "fingerprint": fingerprint(model, config, layout),
        "input_dim": model.input_shape[-1],
        "output_dim": model.output_shape[-1],
        "state_size": sum(component.size for component in components),
        "state_layout": layout,
        "keras_config": config,
        "task": task,
        "provenance": dict(provenance or {}),
    }


def state_layout(components: Sequence[Component]) -> list[dict[str, Any]]:
    """Where each component stands in the row, in floats."""
    layout, offset = [], 0
    for component in components:
        layout.append(
            {"name": component.name, "shape": list(component.shape), "offset": offset, "axes": list(component.axes)}
        )
        offset += component.size
    return layout


def keras_config(model: keras.Sequential) -> dict[str, Any]:
    """The config that ``keras.models.model_from_json`` rebuilds the model from, without how it was trained."""
    config: dict[str, Any] = keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    return config


def fingerprint(model: keras.Sequential, config: Mapping[str, Any], layout: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 over the canonical config, the state layout and the weights, in hexadecimal.

    Two exports with the same fingerprint compute the same: a session may move from one to the other.
    """
    digest = hashlib.sha256()
    digest.update(canonical_json({"config": config, "state_layout": layout}).encode())
    for weight in _lasting_weights(model):
        values = np.ascontiguousarray(ops.convert_to_numpy(weight))
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        digest.update(canonical_json({"dtype": str(weight.dtype), "shape": list(values.shape)}).encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def canonical_json(value: object) -> str:
    """One text for one value: sorted keys, no white space, no NaN.

    Raises:
        TypeError, ValueError: JSON cannot hold it.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _lasting_weights(model: keras.Sequential) -> list[Any]:
    """The weights, without what a stateful layer happens to hold of the sequence that it saw last."""
    layers = [layer for layer in flat_layers(model) if isinstance(layer, keras.layers.RNN)]
    passing = {id(variable) for layer in layers for variable in keras.tree.flatten(getattr(layer, "states", None))}
    return [weight for weight in model.weights if id(weight) not in passing]
