"""Small SavedModels that keep the sequence model contract, with an exact NumPy twin; made in a few milliseconds each.

``state`` is one row of ``WIDTH`` accumulators: each step adds ``scale * inputs`` to it, and its outputs are the state.
"""

import json
from pathlib import Path

import numpy as np
import tensorflow as tf

from service.types import FloatArray, StepBatch, StepBatchResult

WIDTH = 3


def expected(batch: StepBatch, scale: float = 1.0, width: int = WIDTH) -> StepBatchResult:
    """What ``step`` answers, by plain loops."""
    rows, steps, _ = batch.inputs.shape
    state = np.where(batch.reset[:, None], np.float32(0), batch.state).astype(np.float32)
    outputs = np.zeros((rows, steps, width), np.float32)
    for row in range(rows):
        for step in range(batch.lengths[row]):
            state[row] = state[row] + np.float32(scale) * batch.inputs[row, step]
            outputs[row, step] = state[row]
    return StepBatchResult(outputs=outputs, state=state)


def random_batch(rows: int, steps: int, seed: int = 0, width: int = WIDTH) -> StepBatch:
    random = np.random.default_rng(seed)
    lengths = random.integers(0, steps + 1, rows).astype(np.int32)
    inputs = random.standard_normal((rows, steps, width)).astype(np.float32)
    inputs[np.arange(steps)[None, :] >= lengths[:, None]] = 0
    return StepBatch(
        inputs=inputs,
        lengths=lengths,
        reset=random.random(rows) < 0.3,
        state=random.standard_normal((rows, width)).astype(np.float32),
    )


def description(name: str, fingerprint: str, width: int = WIDTH) -> str:
    return json.dumps(
        {
            "model": name,
            "fingerprint": fingerprint,
            "input_dim": width,
            "output_dim": width,
            "state_size": width,
            "state_layout": [{"name": "sums", "shape": [width], "offset": 0, "axes": ["sum"]}],
            "keras_config": {"class_name": "Sums"},
            "task": "sum",
        }
    )


def export_sums(
    models: Path, name: str = "sums", version: int = 1, *, scale: float = 1.0, fingerprint: str = "", width: int = WIDTH
) -> Path:
    """Writes a version; it appears all at once."""
    module = _Sums(description(name, fingerprint or f"{name}-{scale}", width), scale, width)
    target = models / name / str(version)
    half = target.with_name(f".{version}")
    target.parent.mkdir(parents=True, exist_ok=True)
    signatures = {"step": module.step, "serving_default": module.whole, "describe": module.describe}
    tf.saved_model.save(module, str(half), signatures=signatures)
    half.rename(target)
    return target


class _Sums(tf.Module):
    def __init__(self, text: str, scale: float, width: int) -> None:
        super().__init__()
        self.scale = tf.Variable(scale, dtype=tf.float32)
        sequence = tf.TensorSpec([None, None, width], tf.float32, name="inputs")
        self.step = tf.function(
            self._step,
            input_signature=[
                sequence,
                tf.TensorSpec([None], tf.int32, name="lengths"),
                tf.TensorSpec([None], tf.bool, name="reset"),
                tf.TensorSpec([None, width], tf.float32, name="state"),
            ],
        )
        self.whole = tf.function(self._whole, input_signature=[sequence])
        self.describe = tf.function(lambda: {"config": tf.constant(text)}, input_signature=[])

    def _step(self, inputs: tf.Tensor, lengths: tf.Tensor, reset: tf.Tensor, state: tf.Tensor) -> dict[str, tf.Tensor]:
        state = tf.where(reset[:, None], tf.zeros_like(state), state)
        valid = tf.sequence_mask(lengths, tf.shape(inputs)[1], dtype=tf.float32)[:, :, None]
        outputs = valid * (state[:, None, :] + tf.cumsum(self.scale * inputs * valid, axis=1))
        new_state = state + tf.reduce_sum(self.scale * inputs * valid, axis=1)
        return {"outputs": outputs, "state": new_state}

    def _whole(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"outputs": tf.cumsum(self.scale * inputs, axis=1)}


def assert_close(came: StepBatchResult, wanted: StepBatchResult) -> None:
    np.testing.assert_allclose(came.outputs, wanted.outputs, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(came.state, wanted.state, rtol=1e-5, atol=1e-5)


def rows_of(result: StepBatchResult) -> FloatArray:
    return result.state
