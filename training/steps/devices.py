"""Data-parallel training, on the distribution of TensorFlow or of Keras: every batch is shared out over the devices."""

import json
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import keras

from training.checks import ConfigError
from training.steps.network import Spread


@dataclass(frozen=True)
class Devices:
    """The devices that a batch is spread over.

    Attributes:
        spread: a `tf.distribute.Strategy` or a `keras.distribution.Distribution`.
        count: devices, of all hosts.
        writes: whether this process is the one that writes the run's files.
    """

    spread: Spread
    count: int
    writes: bool = True

    def scope(self) -> AbstractContextManager[Any]:
        """The variables made within are kept the same on all devices."""
        scope: AbstractContextManager[Any] = self.spread.scope()
        return scope


def all_devices(batch_size: int) -> Devices:
    """Every GPU of this process, or else every CPU device; with TensorFlow's ``TF_CONFIG``, of all hosts named in it.

    Raises:
        ConfigError: the batch cannot be shared out evenly, or Keras's backend cannot do it.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        raise ConfigError("data-parallel training should run on Keras's tensorflow or jax backend; it is 'torch' now")
    devices = _of_jax() if backend == "jax" else _of_tensorflow()
    if batch_size % devices.count:
        raise ConfigError(f"batch_size should be a multiple of the {devices.count} devices; received {batch_size}")
    return devices


def _of_tensorflow() -> Devices:
    import tensorflow as tf

    if len(json.loads(os.environ.get("TF_CONFIG", "{}")).get("cluster", {}).get("worker", [])) > 1:
        strategy = tf.distribute.MultiWorkerMirroredStrategy()
        writes = strategy.cluster_resolver.task_id == 0
        return Devices(strategy, strategy.num_replicas_in_sync, writes)
    found = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    return Devices(tf.distribute.MirroredStrategy([device.name for device in found]), len(found))


def _of_jax() -> Devices:
    found = keras.distribution.list_devices()
    return Devices(keras.distribution.DataParallel(devices=found, auto_shard_dataset=False), len(found))
