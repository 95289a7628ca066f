"""Steps that go together, as columns of a message: a few arrays, where each by itself would be some small messages."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client.blocks import Block
from service.client.steps import Line, Step
from service.client.wire import FLOAT32, LITTLE_FLOAT32, FloatArray

# Time limits are rounded up to a multiple of this many nanoseconds: steps that were asked for one after the other may
# then share one. Each still ends for its caller when it ends.
_TICK_NS = 10_000_000


class Look(NamedTuple):
    """What steps must have in common to be columns: the shape of their inputs, and their time limit in ticks."""

    shape: tuple[int, ...]
    ticks: int


class Sorter:
    """Sorts steps by their look.

    Attributes:
        alike: Steps and blocks by their look, in their order; by None the steps that have to be sent by themselves.

    Args:
        now: On the clock of the steps' deadlines.
        columns: Whether there may be columns at all.
    """

    def __init__(self, now: float, *, columns: bool) -> None:
        self.alike: dict[Look | None, list[Step | Block]] = {}
        self._now = now
        self.columns = columns
        # The look of the last step, which is often that of the next: its shape, and from when to when it may end.
        self._shape: tuple[int, ...] | None = None
        self._after = self._until = 0.0
        self._same: list[Step | Block] = []

    def add(self, step: Step | Block) -> None:
        """Puts a step, or a block of them, to those that look like it."""
        if step.shape != self._shape or not self._after < step.deadline <= self._until or step.traceparent:
            look = look_of(step, self._now) if self.columns else None
            self._same = self.alike.setdefault(look, [])
            self._shape = None if look is None else look.shape
            if look is not None:
                self._until = self._now + look.ticks * _TICK_NS / 1e9
                self._after = self._until - _TICK_NS / 1e9
        self._same.append(step)


def look_of(step: Step | Block, now: float) -> Look | None:
    """What a step looks like, or each of a block; None where it has to be sent by itself."""
    if len(step.shape) != 2 or not step.content or step.traceparent:
        return None
    return Look(step.shape, max(1, math.ceil((step.deadline - now) * 1e9 / _TICK_NS)))


def fill_columns(columns: pb.StepColumns, look: Look, steps: Sequence[Step | Block]) -> None:
    """Writes steps of this look into a message; each has its request id already."""
    names: list[str] = []
    lines: list[Line] = []
    begins: list[int] = []
    for step in steps:
        if isinstance(step, Block):
            names += step.request_ids
            lines += step.lines
            begins += step.begins
        else:
            names.append(step.request_id)
            lines.append(step.line)
            begins.append(step.position)
    columns.request_ids.extend(names)
    columns.session_ids.extend([line.session_id for line in lines])
    columns.positions.extend(begins)
    inputs = columns.inputs
    inputs.dtype = FLOAT32
    inputs.shape.extend((len(names), *look.shape))
    inputs.content = b"".join([step.content for step in steps])
    columns.timeout.seconds, columns.timeout.nanos = divmod(look.ticks * _TICK_NS, 1_000_000_000)


def read_outputs(results: pb.StepResultColumns) -> FloatArray:
    """The outputs ``[steps, time, output_dim]``, read-only: whoever hands them out makes copies.

    Raises:
        ValueError: the columns do not fit each other.
    """
    tensor, names, positions = results.outputs, results.request_ids, results.positions
    shape = tuple(tensor.shape)
    if tensor.dtype != FLOAT32 or len(shape) != 3 or not len(names) == len(positions) == shape[0]:
        raise ValueError(
            f"{len(names)} request ids and {len(positions)} positions came with outputs of shape {list(shape)} "
            f"and dtype {tensor.dtype}"
        )
    return np.frombuffer(tensor.content, LITTLE_FLOAT32).reshape(shape)
