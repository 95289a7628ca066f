"""Steps as columns of a message (``StepColumns``): what can be told of them without looking at the values.

Whatever is out of the ordinary with one of them is left to the code for single steps: here it becomes a request again.
"""

import itertools
from collections.abc import Sequence

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import InvalidArgument, InvalidTensor, MessageTooLarge


def lone_request(message: pb.StreamStepsRequest) -> pb.StepRequest | None:
    """The step of a message that has one, as a request, and nothing else.

    Lists that are empty are not looked at: protobuf makes one, in memory of its own, for whoever does.
    """
    fields = message.ListFields()
    if len(fields) == 1 and fields[0][0].number == pb.StreamStepsRequest.REQUESTS_FIELD_NUMBER:
        requests = message.requests
        if len(requests) == 1:
            return requests[0]
    return None


def check_count(message: pb.StreamStepsRequest, most: int) -> None:
    """Checks how many steps a message holds.

    Raises:
        MessageTooLarge: more than ``most``.
        InvalidArgument: columns that hold none: nobody could be told what is wrong with them.
    """
    blocks = message.columns
    if not blocks:
        return  # requests were counted before they were parsed
    counts = [steps_of(columns) for columns in blocks]
    if (steps := len(message.requests) + sum(counts)) > most:
        raise MessageTooLarge(f"the message has {steps} steps; at most {most} are taken", limit=most)
    if not all(counts):
        field = f"columns[{counts.index(0)}].request_ids"
        raise InvalidArgument(f"{field[:-12]} has no step; expected at least one", field=field)


def check_columns(columns: pb.StepColumns) -> None:
    """Checks that the columns fit each other, so that each step can be told from the others.

    Raises:
        InvalidArgument: they are of different lengths.
        InvalidTensor: the inputs are not ``[steps, time, input_dim]``, or have too many or too few bytes.
    """
    steps = steps_of(columns)
    for name in ("request_ids", "session_ids", "positions"):
        if (there := len(getattr(columns, name))) != steps:
            raise InvalidArgument(
                f"columns.{name} has {there} entries; expected {steps}, one for each step", field=f"columns.{name}"
            )
    shape = list(columns.inputs.shape)
    if len(shape) != 3 or shape[0] != steps or min(shape) < 1:
        raise InvalidTensor(
            f"columns.inputs.shape is {shape}; expected [{steps}, time, input_dim], one or more of each",
            field="columns.inputs.shape",
        )
    there, expected = len(columns.inputs.content), 4 * shape[0] * shape[1] * shape[2]
    if there != expected:
        raise InvalidTensor(
            f"columns.inputs.content has {there} bytes; shape {shape} of float32 takes {expected}",
            field="columns.inputs.content",
        )


def part_of(columns: pb.StepColumns, begin: int, end: int) -> pb.StepColumns:
    """The steps ``begin`` to ``end`` of columns that fit each other."""
    tensor = columns.inputs
    steps, *shape = tensor.shape
    each = len(tensor.content) // steps
    part = pb.StepColumns(
        request_ids=columns.request_ids[begin:end],
        session_ids=columns.session_ids[begin:end],
        positions=columns.positions[begin:end],
    )
    part.inputs.dtype = tensor.dtype
    part.inputs.shape.extend((end - begin, *shape))
    part.inputs.content = tensor.content[begin * each : end * each]
    if columns.HasField("timeout"):
        part.timeout.CopyFrom(columns.timeout)
    return part


def request_of(columns: pb.StepColumns, at: int) -> pb.StepRequest:
    """One of the steps, by itself, of columns that fit each other."""
    tensor = columns.inputs
    steps, *shape = tensor.shape
    each = len(tensor.content) // steps
    request = pb.StepRequest(
        request_id=columns.request_ids[at], session_id=columns.session_ids[at], position=columns.positions[at]
    )
    request.inputs.dtype = tensor.dtype
    request.inputs.shape.extend(shape)
    request.inputs.content = tensor.content[at * each : (at + 1) * each]
    if columns.HasField("timeout"):
        request.timeout.CopyFrom(columns.timeout)
    return request


def requests_of(columns: pb.StepColumns) -> Sequence[pb.StepRequest]:
    """All of the steps, each by itself, of columns that fit each other."""
    return [request_of(columns, at) for at in range(len(columns.request_ids))]


def names_of(columns: pb.StepColumns) -> Sequence[pb.StepRequest]:
    """What a refusal of the steps needs of each, whether or not the columns fit each other: its ids."""
    ids = itertools.zip_longest(columns.request_ids, columns.session_ids, columns.positions, fillvalue="")
    return [pb.StepRequest(request_id=request_id, session_id=session_id) for request_id, session_id, _ in ids]


def steps_of(columns: pb.StepColumns) -> int:
    """How many steps columns have, whether or not they fit each other."""
    return max(len(columns.request_ids), len(columns.session_ids), len(columns.positions))
