"""Writes a Keras model as a served version: a SavedModel by the sequence model contract (docs/contract.md)."""

import datetime as dt
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from training.exporting.description import canonical_json, describe
from training.exporting.loop import SequenceModel, components_of
from training.exporting.portability import check_portable
from training.exporting.publication import check_name, choose_version, publication
from training.exporting.stages import ExportError, stages_of
from training.exporting.warmup import write_warmup

__all__ = ["ExportError", "export_model"]

# The batch buckets of the gateway, and a step each of one time step and of a whole turn.
_WARMUP_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_WARMUP_TIMES = (1, 16)
# How far the exported step may be from the model itself, relative to one plus the output.
_TOLERANCE = 1e-3


def export_model(
    model: keras.Sequential,
    directory: Path | str,
    *,
    name: str,
    version: int | None = None,
    task: str = "",
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Exports a model as ``directory/name/version``, which appears whole or not at all.

    What is exported is checked first: stepped in chunks, it has to give what the model gives on the whole sequence.

    Args:
        model: A built ``Sequential`` of recurrent layers, each returning sequences, and of layers that work on each
            time step by itself. Dropout and noise are left out, as at inference.
        directory: Where the models stand, each in a directory of its name.
        name: ``[A-Za-z0-9_-]{1,64}``.
        version: At least 1; None for one above the highest that is there.
        task: What it was trained on.
        provenance: How it was trained: anything that JSON holds.

    Returns:
        The version's directory.

    Raises:
        ExportError: the model cannot be stepped, and the text says which layer and why; or it has operations that a GPU
            or the model servers' TensorFlow lacks, and the text lists them.
        FileExistsError: the version is there; nothing is ever overwritten.
        ValueError: the name or the version is out of range, or JSON cannot hold ``provenance``.
        RuntimeError: Keras runs on another backend than TensorFlow.
    """
    _check_backend()
    check_name(name)
    target_parent = Path(directory) / name
    version = choose_version(target_parent, version)
    stages = stages_of(model)
    _check_shapes(model)
    description = describe(model, components_of(stages), name=name, task=task, provenance=provenance)
    module = SequenceModel(model, stages, canonical_json(description))
    _check_steps(model, module)
    target = target_parent / str(version)
    with publication(target) as partial:
        tf.saved_model.save(module, str(partial), signatures=module.signatures())
        check_portable({"step": module.step, "serving_default": module.serving_default}, partial)
        _write_extra(partial / "assets.extra", model, description)
    return target


def _write_extra(directory: Path, model: keras.Sequential, description: Mapping[str, Any]) -> None:
    """What stands beside the SavedModel: the manifest, the Keras model and the warmup requests."""
    directory.mkdir()
    manifest = {
        **description,
        "created": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "keras_version": keras.__version__,
        "tensorflow_version": tf.__version__,
    }
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    model.save(directory / "model.keras")
    write_warmup(
        directory / "tf_serving_warmup_requests",
        name=description["model"],
        input_dim=description["input_dim"],
        state_size=description["state_size"],
        batches=_WARMUP_BATCHES,
        times=_WARMUP_TIMES,
    )


def _check_backend() -> None:
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise RuntimeError(
            f"export needs Keras on TensorFlow; it runs on {backend}. Save the model as .keras, then load and export "
            "it with KERAS_BACKEND=tensorflow"
        )


def _check_shapes(model: keras.Sequential) -> None:
    try:
        shapes = {"inputs": model.input_shape, "outputs": model.output_shape}
    except (AttributeError, ValueError) as error:
        raise ExportError(f"the model has no shapes yet, give it a keras.Input: {error}") from error
    for what, shape in shapes.items():
        if len(shape) != 3 or shape[-1] is None:
            raise ExportError(f"expected {what} [batch, time, width]; the model's have the shape {shape}")


def _check_steps(model: keras.Sequential, module: SequenceModel) -> None:
    """Steps a random sequence in two chunks and compares with the model itself.

    Raises:
        ExportError: they differ: a layer sees more than one time step, or does something else that steps cannot.
    """
    batch, time = model.input_shape[0] or 2, model.input_shape[1] or 5
    inputs = np.random.default_rng(0).normal(size=(batch, time, model.input_shape[-1])).astype(np.float32)
    state = np.zeros((batch, module.first_state.shape[1]), np.float32)
    chunks, start = [], 0
    for length in (time // 2, time - time // 2):
        arguments = (np.full(batch, length, np.int32), np.full(batch, start == 0), state)
        result = module.step(*(tf.constant(value) for value in (inputs[:, start : start + length], *arguments)))
        state, start = result["state"].numpy(), start + length
        chunks.append(result["outputs"].numpy())
    stepped, whole = np.concatenate(chunks, axis=1), _whole(model, inputs)
    difference = float(np.max(np.abs(stepped - whole) / (1 + np.abs(whole)), initial=0))
    if not difference <= _TOLERANCE:
        raise ExportError(
            f"stepping {model.name!r} does not give what the model gives on the whole sequence: they differ by "
            f"{difference:.2g} relative to 1 + |output|, at most {_TOLERANCE:.2g} is expected"
        )


def _whole(model: keras.Sequential, inputs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The model's own outputs; a stateful layer's states are left as they were."""
    variables = [variable for layer in model.layers for variable in keras.tree.flatten(getattr(layer, "states", None))]
    variables = [variable for variable in variables if isinstance(variable, keras.Variable)]
    before = [variable.numpy() for variable in variables]
    for layer in model.layers:
        if getattr(layer, "stateful", False):
            layer.reset_state()
    outputs = ops.convert_to_numpy(ops.cast(model(inputs, training=False), "float32"))
    for variable, value in zip(variables, before, strict=True):
        variable.assign(value)
    return np.asarray(outputs)
