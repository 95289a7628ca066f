"""Steps as columns of a message (``StepColumns``): what can be told of them without looking at the values.

Each column is taken out of the message once. Whatever is out of the ordinary with one of the steps is left to the code
for single steps: here it becomes a request again.
"""

import itertools
from collections.abc import Sequence, Sized
from typing import NamedTuple

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.errors import InvalidArgument, InvalidTensor, MessageTooLarge


def check_count(message: pb.StreamStepsRequest, most: int) -> None:
    """Checks how many steps a message holds.

    Raises:
        MessageTooLarge: more than ``most``.
        InvalidArgument: columns that hold none: nobody could be told what is wrong with them.
    """
    blocks = message.columns
    if not blocks:
        return  # requests were counted before they were parsed
    counts = [_longest(columns.request_ids, columns.session_ids, columns.positions) for columns in blocks]
    if (steps := len(message.requests) + sum(counts)) > most:
        raise MessageTooLarge(f"the message has {steps} steps; at most {most} are taken", limit=most)
    if not all(counts):
        field = f"columns[{counts.index(0)}].request_ids"
        raise InvalidArgument(f"{field[:-12]} has no step; expected at least one", field=field)


class Columns(NamedTuple):
    """The steps of a ``StepColumns``, whether or not the columns fit each other.

    Attributes:
        request_ids: By place.
        session_ids: Likewise.
        positions: Likewise.
        dtype: Of the inputs, as protobuf numbers it.
        shape: Of the inputs, as it came.
        content: Their bytes.
        timeout: Of each step, seconds and nanoseconds; None where they have none. Not protobuf's own: that would keep
            the whole message.
    """

    request_ids: list[str]
    session_ids: list[str]
    positions: list[int]
    dtype: "tensor_pb2.DataType.ValueType"
    shape: tuple[int, ...]
    content: bytes
    timeout: tuple[int, int] | None

    @classmethod
    def of(cls, columns: pb.StepColumns) -> "Columns":
        """What a message holds."""
        tensor = columns.inputs
        return cls(
            list(columns.request_ids),
            list(columns.session_ids),
            list(columns.positions),
            tensor.dtype,
            tuple(tensor.shape),
            tensor.content,
            (columns.timeout.seconds, columns.timeout.nanos) if columns.HasField("timeout") else None,
        )

    @property
    def steps(self) -> int:
        """How many there are."""
        return _longest(self.request_ids, self.session_ids, self.positions)

    def check(self) -> None:
        """Checks that the columns fit each other, so that each step can be told from the others.

        Raises:
            InvalidArgument: they are of different lengths.
            InvalidTensor: the inputs are not ``[steps, time, input_dim]``, or have too many or too few bytes.
        """
        steps, shape = self.steps, self.shape
        there = {
            "request_ids": len(self.request_ids),
            "session_ids": len(self.session_ids),
            "positions": len(self.positions),
        }
        for name, entries in there.items():
            if entries != steps:
                raise InvalidArgument(
                    f"columns.{name} has {entries} entries; expected {steps}, one for each step",
                    field=f"columns.{name}",
                )
        if len(shape) != 3 or shape[0] != steps or min(shape) < 1:
            raise InvalidTensor(
                f"columns.inputs.shape is {list(shape)}; expected [{steps}, time, input_dim], one or more of each",
                field="columns.inputs.shape",
            )
        if len(self.content) != (expected := 4 * shape[0] * shape[1] * shape[2]):
            raise InvalidTensor(
                f"columns.inputs.content has {len(self.content)} bytes; shape {list(shape)} of float32 takes "
                f"{expected}",
                field="columns.inputs.content",
            )

    def part(self, begin: int, end: int) -> "Columns":
        """The steps ``begin`` to ``end`` of columns that fit each other."""
        steps, *shape = self.shape
        each = len(self.content) // steps
        return Columns(
            self.request_ids[begin:end],
            self.session_ids[begin:end],
            self.positions[begin:end],
            self.dtype,
            (end - begin, *shape),
            self.content[begin * each : end * each],
            self.timeout,
        )

    def request(self, at: int) -> pb.StepRequest:
        """One of the steps, by itself, of columns that fit each other."""
        steps, *shape = self.shape
        each = len(self.content) // steps
        request = pb.StepRequest(
            request_id=self.request_ids[at], session_id=self.session_ids[at], position=self.positions[at]
        )
        request.inputs.dtype = self.dtype
        request.inputs.shape.extend(shape)
        request.inputs.content = self.content[at * each : (at + 1) * each]
        if self.timeout is not None:
            request.timeout.SetInParent()
            request.timeout.seconds, request.timeout.nanos = self.timeout
        return request

    def requests(self) -> Sequence[pb.StepRequest]:
        """All of the steps, each by itself, of columns that fit each other."""
        return [self.request(at) for at in range(self.steps)]

    def names(self) -> Sequence[pb.StepRequest]:
        """What a refusal of the steps needs of each, whether or not the columns fit each other: its ids."""
        ids = itertools.zip_longest(self.request_ids, self.session_ids, self.positions, fillvalue="")
        return [pb.StepRequest(request_id=request_id, session_id=session_id) for request_id, session_id, _ in ids]


def _longest(*columns: Sized) -> int:
    return max(map(len, columns))
