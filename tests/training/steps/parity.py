"""A few updates from given weights on given batches, on whatever backend Keras runs on, on one device or on several.

Usage: parity.py START.npz OUTPUT.npz DEVICES NOISE
"""

import contextlib
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[3])

import keras
import numpy as np

from training.config import ModelConfig, Recipe
from training.models import build_model
from training.step import Rates, Trainer
from training.steps.devices import all_devices
from training.tasks import Batch, make_task

TASK = make_task("copy", bits=3, max_length=3)
BATCH_SIZE, UPDATES = 4, 4
# A norm that clips some of the gradients.
RATES = Rates(learning_rate=0.01, clip_norm=2.0, noise=0.0)


def first_weights():
    """Where every backend starts: their own initial weights differ, because their random numbers do."""
    return [keras.ops.convert_to_numpy(weight) for weight in _model(_noise()).trainable_variables]


def run(start, devices=1, noise_level=0.0):
    """What the updates gave: loss and wrong bits, the weights and their averages, by name.

    With noise, every device gets the same few rows, so that all that may tell two devices from one is the noise.
    """
    spread = all_devices(BATCH_SIZE) if devices > 1 else None
    assert spread is None or spread.count == devices
    with spread.scope() if spread else contextlib.nullcontext():
        noise = _noise()
        model = _model(noise)
        trainer = Trainer(
            model, Recipe(average=0.5, compiled=devices > 1), noise, spread=spread.spread if spread else None
        )
    trainer.restart(_with(start))
    generator = np.random.default_rng(2)
    if noise_level:
        batches = [_repeated(TASK.training_batch(generator, 2), devices) for _ in range(UPDATES)]
    else:
        batches = [TASK.training_batch(generator, BATCH_SIZE) for _ in range(UPDATES)]
    progress = trainer.run(batches, RATES._replace(noise=noise_level))
    weights = [keras.ops.convert_to_numpy(weight) for weight in model.trainable_variables]
    named = {f"weight {i}": weight for i, weight in enumerate(weights)}
    return {"progress": np.array(progress), **named, **{f"average {i}": v for i, v in enumerate(trainer.average)}}


def _repeated(batch, times):
    return Batch(*(np.concatenate([array] * times) for array in batch))


def _noise():
    return keras.Variable(0.0, trainable=False)


def _model(noise):
    config = ModelConfig(units=6, n_slots=8, m_depth=4)
    return build_model(config, TASK.input_dim, TASK.output_dim, seed=1, noise=noise)


def _with(weights):
    model = _model(_noise())
    for variable, weight in zip(model.trainable_variables, weights, strict=True):
        variable.assign(weight)
    return model


def _make_virtual_devices(count):
    """As many CPU devices as are wanted on TensorFlow; JAX is told by JAX_NUM_CPU_DEVICES."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        devices = [tf.config.LogicalDeviceConfiguration() for _ in range(count)]
        tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)


if __name__ == "__main__":
    _make_virtual_devices(int(sys.argv[3]))
    with np.load(sys.argv[1]) as found:
        weights = [found[name] for name in found.files]
    np.savez(sys.argv[2], **run(weights, int(sys.argv[3]), float(sys.argv[4])))
