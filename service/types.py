"""The values that the parts of the gateway pass to each other. Frozen, and free of protobuf, gRPC and TensorFlow."""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


class VersionKey(NamedTuple):
    """One version of one model."""

    model: str
    version: int

    def __str__(self) -> str:
        return f"{self.model}/{self.version}"


@dataclass(frozen=True, slots=True)
class StateComponent:
    """A named slice of the flat state row: elements ``[offset, offset + prod(shape))``."""

    name: str
    shape: tuple[int, ...]
    offset: int
    axes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version that an executor can run, as its ``describe`` signature tells it."""

    key: VersionKey
    fingerprint: str
    input_dim: int
    output_dim: int
    state_size: int
    state_layout: tuple[StateComponent, ...]
    keras_config_json: str = field(repr=False, default="")
    task: str = ""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """What one executor call takes.

    Attributes:
        inputs: ``[batch, time, input_dim]``; rows are padded with zeros past their length.
        lengths: ``[batch]``, int32: valid time steps of each row, 0..time. A padding row has 0.
        reset: ``[batch]``, bool: start this row from the model's initial state, whatever ``state`` holds.
        state: ``[batch, state_size]``.
    """

    inputs: FloatArray
    lengths: IntArray
    reset: BoolArray
    state: FloatArray


@dataclass(frozen=True, slots=True)
class StepBatchResult:
    """What one executor call returns: ``outputs`` ``[batch, time, output_dim]``, ``state`` ``[batch, state_size]``."""

    outputs: FloatArray
    state: FloatArray
