"""The values that the parts of the gateway pass to each other. Frozen, and free of protobuf, gRPC and TensorFlow."""

import ctypes
import enum
import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from service.digests import Digests

# Bytes. Where an array begins at a multiple of this, TensorFlow and XLA take it without a copy.
ALIGNMENT = 64
# Up to so many values it takes less to write down which are finite than to begin two reductions.
_FEW_VALUES = 32 * 1024

FloatArray = npt.NDArray[np.float32]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

# Made once: NumPy makes one anew of each class that it is given in its place.
_FLOAT32, _INT32, _BOOL = np.dtype(np.float32), np.dtype(np.int32), np.dtype(np.bool_)


# ``tuple_of(Cls, values)`` makes a named tuple of all its values in their order, at a third of what ``Cls(...)`` costs:
# some are made several times for every step.
tuple_of = tuple.__new__

_T = TypeVar("_T")


def take(sequence: Sequence[_T], places: Sequence[int]) -> Sequence[_T]:
    """What stands at some places, all different and in their order: often all there is. A range has no gaps."""
    if len(places) == len(sequence):
        return sequence
    if isinstance(places, range):
        return sequence[places.start : places.stop]
    return [sequence[place] for place in places]


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


class VersionState(enum.Enum):
    """What a version is good for."""

    LOADING = "loading"
    """It is being loaded."""
    AVAILABLE = "available"
    """It takes new sessions and steps."""
    DRAINING = "draining"
    """It steps the sessions that it has and takes no new ones."""
    FAILED = "failed"
    """It could not be loaded."""
    UNAVAILABLE = "unavailable"
    """It is not served; the sessions that it has are kept until it is back."""


class VersionStatus(NamedTuple):
    """A version's state, and what there is to say about it."""

    state: VersionState
    message: str = ""


class StepBatch(NamedTuple):
    """What one executor call takes.

    Attributes:
        inputs: ``[batch, time, input_dim]``; rows are padded with zeros past their length.
        lengths: ``[batch]``, int32: valid time steps of each row, 0..time. A padding row has 0.
        reset: ``[batch]``, bool: start this row from the model's initial state, whatever ``state`` holds.
        state: ``[batch, state_size]``.
        origins: What the rows that are no padding came from, each as the batcher was told; for traces, which is why
            an executor that knows nothing of them may leave it be. Maybe empty where it was told nothing.
        aligned: Whether each array is known to begin at a multiple of ``ALIGNMENT`` and to be contiguous and writeable,
            or to be there as ``native``.
        native: ``state`` as the executor answered it with an earlier batch (``StepBatchResult.native``), or None.
        again: The same batch, this very tuple, comes again with other values in its arrays once it has been answered.
            What an executor makes of the arrays, not of their values, it may keep for then.
    """

    inputs: FloatArray
    lengths: IntArray
    reset: BoolArray
    state: FloatArray
    origins: tuple[object, ...] = ()
    aligned: bool = False
    native: object = None
    again: bool = False


def address_of(array: npt.NDArray[Any]) -> int:
    """Where the bytes of a contiguous, writeable array begin, of which there is one at the least.

    Not ``__array_interface__``: NumPy interns the keys of that dictionary each time. Python, which deletes them from
    its table of interned strings when they go, uses up a place for each: the table doubles, and is later made anew.
    """
    return ctypes.addressof(ctypes.c_char.from_buffer(array.data))


def empty_batch(
    rows: int,
    steps: int,
    input_dim: int,
    state_size: int,
    origins: tuple[object, ...] = (),
    *,
    again: bool = False,
) -> StepBatch:
    """A batch of nothing: inputs, lengths and resets of zeros; its states hold whatever was there.

    One block of memory, in which each array begins where executors can use it as it is.
    """
    at_lengths, at_reset, at_state, size = _layout(rows, steps, input_dim, state_size)
    block = np.empty(size, np.uint8)
    first = -address_of(block) % ALIGNMENT
    block[first : first + at_state] = 0
    array = np.ndarray
    values = (
        array((rows, steps, input_dim), _FLOAT32, block, first),
        array((rows,), _INT32, block, first + at_lengths),
        array((rows,), _BOOL, block, first + at_reset),
        array((rows, state_size), _FLOAT32, block, first + at_state),
        *(origins, True, None, again),
    )
    return tuple_of(StepBatch, values)


def batch_of(
    states: FloatArray, native: object, steps: int, input_dim: int, origins: tuple[object, ...] = ()
) -> StepBatch:
    """A batch of states that the executor has as ``native``, having answered them before; all else is of zeros."""
    rest = empty_batch(len(states), steps, input_dim, 0)
    return StepBatch(rest.inputs, rest.lengths, rest.reset, states, origins, aligned=True, native=native)


@functools.lru_cache(maxsize=1024)
def _layout(rows: int, steps: int, input_dim: int, state_size: int) -> tuple[int, ...]:
    """Where lengths, resets and states begin in the block of a batch, and how long it is."""
    sizes = (4 * rows * steps * input_dim, 4 * rows, rows, 4 * rows * state_size)
    *begins, end = itertools.accumulate(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)
    return *begins, end + ALIGNMENT


class StepBatchResult(NamedTuple):
    """What one executor call returns.

    Attributes:
        outputs: ``[batch, time, output_dim]``.
        state: ``[batch, state_size]``.
        finite: Whether all of both has been seen to be finite; False also where nobody looked.
        native: ``state`` as the executor has it, if it can use that again as it is: a batch of these very states may
            bring it along (``StepBatch.native``). It keeps the memory of ``state``, and no other.
    """

    outputs: FloatArray
    state: FloatArray
    finite: bool = False
    native: object = None


def all_finite(*arrays: FloatArray) -> bool:
    """Whether there is neither NaN nor Inf in them."""
    for part in arrays:
        if part.size <= _FEW_VALUES:
            if 0 in np.isfinite(part).tobytes():  # bytes are searched faster than `all` is called
                return False
        # NaN survives the search for a maximum.
        elif not (math.isfinite(part.max()) and math.isfinite(part.min())):
            return False
    return True


class SessionKey(NamedTuple):
    """Sessions are keyed by their owner and their id: two principals may use the same id and never meet."""

    principal: str
    session_id: str


class StepCall(NamedTuple):
    """One step as its caller asked for it, checked as far as that goes without its model.

    Attributes:
        key: Whose session.
        position: Where the chunk begins, in time steps; None applies it wherever the session stands.
        inputs: ``[time, input_dim]``, finite, time at least 1.
        digest: SHA-256 over dtype, shape and bytes of ``inputs``: what makes a repeated step the same step.
        deadline: When its caller stops waiting, on the event loop's clock, in seconds.
        caller: Who asks, for turns and shares: a principal, or a connection where there are none.
    """

    key: SessionKey
    position: int | None
    inputs: FloatArray
    digest: bytes
    deadline: float
    caller: str = ""


@dataclass(slots=True)
class StepCalls:
    """Steps of one message that look alike, each of another session, checked as a ``StepCall`` is.

    Attributes:
        principal: Whose sessions.
        caller: As in ``StepCall``.
        deadline: Likewise.
        inputs: ``[steps, time, input_dim]``.
        session_ids: Which, by place.
        positions: Where each chunk begins; None applies it wherever its session stands.
        digests: By place.
        names: What each of them may be cancelled by.
    """

    principal: str
    caller: str
    deadline: float
    inputs: FloatArray
    session_ids: Sequence[str]
    positions: Sequence[int | None]
    digests: Digests
    names: Sequence[str]


class StepReply(NamedTuple):
    """What a step returns: the time steps consumed once it was applied, and ``outputs`` ``[time, output_dim]``."""

    position: int
    outputs: FloatArray
