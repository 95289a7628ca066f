"""Steps of one message that look alike, and their results: as many at a time as there are.

They came as requests or as columns (``StepColumns``), and are answered as they came.
"""

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.answers import Answers
from service.codec import FLOAT32, LITTLE_FLOAT32, MAX_REQUEST_ID
from service.columns import Columns
from service.digests import Digests
from service.sessions.cohort import Replies
from service.step_stream import Answer
from service.types import FloatArray, StepReply, all_finite, take

# Steps whose time limits differ by less than a tick may share one.
_TICKS_A_SECOND = 100
# A block of results holds about this many bytes at the most, so that messages can be made of any size above it.
_BLOCK_BYTES = 1024 * 1024
# The most that a result has beside its outputs: two ids, one of them of any characters, and a position.
_BESIDE = 384


class AlikeSteps(Protocol):
    """Steps with inputs of the same shape and about the same time limit, by place."""

    @property
    def limit(self) -> float | None:
        """The time limit of each, in seconds; None where they have none."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Their request ids."""
        ...

    @property
    def session_ids(self) -> Sequence[str]:
        """Of each. Not checked: an id that is none has no session."""
        ...

    @property
    def positions(self) -> Sequence[int | None]:
        """Where each says that it begins; None where it does not say."""
        ...

    @property
    def inputs(self) -> FloatArray:
        """``[steps, time, input_dim]``, finite."""
        ...

    @property
    def digests(self) -> Digests:
        """Of each one's inputs, as ``codec.parse_inputs`` makes them."""
        ...

    def request(self, place: int, /) -> pb.StepRequest:
        """One of them, by itself."""
        ...

    def render(self, answers: Answers, places: Sequence[int], replies: Sequence[StepReply], /) -> Sequence[Answer]:
        """The replies of some of them, in the order of their places, in parts of a limited size."""
        ...


class RequestSteps:
    """``AlikeSteps`` that came as requests."""

    __slots__ = ("contents", "digests", "inputs", "limit", "names", "positions", "requests", "session_ids")

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.requests: list[pb.StepRequest] = []
        self.names: list[str] = []
        self.session_ids: list[str] = []
        self.positions: list[int | None] = []
        self.contents: list[bytes] = []
        self.digests: Digests
        self.inputs: FloatArray

    def request(self, place: int) -> pb.StepRequest:
        """See ``AlikeSteps``."""
        return self.requests[place]

    def render(self, answers: Answers, places: Sequence[int], replies: Sequence[StepReply]) -> Sequence[Answer]:
        """See ``AlikeSteps``."""
        names, session_ids = take(self.names, places), take(self.session_ids, places)
        return [answers.of_requests(names[at], session_ids[at], block) for at, block in _in_blocks(replies)]

    def finish(self, time: int, width: int) -> Sequence[pb.StepRequest]:
        """Makes ``inputs``; returns the steps in which there is NaN or Inf, which are taken out."""
        flat = np.frombuffer(self.contents[0] if len(self.contents) == 1 else b"".join(self.contents), LITTLE_FLOAT32)
        self.inputs = inputs = flat.reshape(-1, time, width)
        self.digests = Digests(inputs)
        if all_finite(flat):
            return ()
        good = [at for at in range(len(inputs)) if np.isfinite(inputs[at]).all()]
        refused = [request for at, request in enumerate(self.requests) if not np.isfinite(inputs[at]).all()]
        self.requests = [self.requests[at] for at in good]
        self.names = [self.names[at] for at in good]
        self.session_ids = [self.session_ids[at] for at in good]
        self.positions = [self.positions[at] for at in good]
        self.inputs = inputs[good]
        self.digests = Digests(self.inputs)
        return refused


class ColumnSteps:
    """``AlikeSteps`` that came as columns."""

    __slots__ = ("_columns", "digests", "inputs", "limit", "names", "positions", "session_ids")

    def __init__(self, columns: Columns, limit: float | None, inputs: FloatArray) -> None:
        self._columns = columns
        self.limit = limit
        self.names = columns.request_ids
        self.session_ids = columns.session_ids
        self.positions: Sequence[int | None] = columns.positions
        self.inputs = inputs
        self.digests = Digests(inputs)

    def request(self, place: int) -> pb.StepRequest:
        """See ``AlikeSteps``."""
        return self._columns.request(place)

    def render(self, answers: Answers, places: Sequence[int], replies: Sequence[StepReply]) -> Sequence[Answer]:
        """See ``AlikeSteps``."""
        names = take(self.names, places)
        return [answers.of_columns(names[at], block) for at, block in _in_blocks(replies)]


Sorted: TypeAlias = tuple[Sequence[AlikeSteps], Sequence[pb.StepRequest]]


def parse_requests(requests: Sequence[pb.StepRequest], max_chunk_bytes: int) -> Sorted:
    """Sorts a message's requests by the shape of their inputs and by their time limit, which it rounds up a little.

    Returns:
        Those that look alike, and those that ``codec.parse_step`` or ``codec.parse_timeout`` refuse.
    """
    return _parse_alike(requests, max_chunk_bytes) or _sort(requests, max_chunk_bytes)


def _parse_alike(requests: Sequence[pb.StepRequest], max_chunk_bytes: int) -> Sorted | None:
    """Those of a message in which all look alike, as most do: a column at a time, for half of what ``_sort`` takes.

    None where they do not, or something is wrong with one of them.
    """
    tensors = [request.inputs for request in requests]
    shape: Sequence[int] = tensors[0].shape if tensors else ()
    if len(shape) != 2:
        return None
    time, width = shape
    contents = [tensor.content for tensor in tensors]
    (size, *others) = set(map(len, contents))
    if others or time < 1 or size != 4 * time * width or not 0 < size <= max_chunk_bytes:
        return None
    for tensor in tensors:
        if tensor.dtype != FLOAT32 or tensor.shape != shape:
            return None
    limits = {
        ((limit := request.timeout).seconds, limit.nanos) if request.HasField("timeout") else None
        for request in requests
    }
    (ticks, *others) = {0 if limit is None else _ticks(*limit) for limit in limits}
    names = [request.request_id for request in requests]
    if others or ticks < 0 or max(map(len, names)) > MAX_REQUEST_ID:
        return None
    steps = RequestSteps(_seconds(ticks))
    steps.requests, steps.names, steps.contents = list(requests), names, contents
    steps.session_ids = [request.session_id for request in requests]
    steps.positions = [request.position if request.HasField("position") else None for request in requests]
    refused = steps.finish(time, width)
    return ((steps,) if steps.requests else ()), refused


def _sort(requests: Sequence[pb.StepRequest], max_chunk_bytes: int) -> Sorted:
    """One pass, and no call that is not needed: it is done for every step."""
    by_look: dict[tuple[int, int, int], RequestSteps] = {}
    others: list[pb.StepRequest] = []
    for request in requests:
        tensor, name, ticks = request.inputs, request.request_id, 0
        content, sizes = tensor.content, tensor.shape
        if request.HasField("timeout"):
            ticks = _ticks(request.timeout.seconds, request.timeout.nanos)
        if len(sizes) != 2 or tensor.dtype != FLOAT32 or len(name) > MAX_REQUEST_ID or ticks < 0:
            others.append(request)
            continue
        time, width = sizes
        size = 4 * time * width
        if time < 1 or len(content) != size or not 0 < size <= max_chunk_bytes:
            others.append(request)
            continue
        steps = by_look.get((time, width, ticks))
        if steps is None:
            steps = RequestSteps(_seconds(ticks))
            by_look[time, width, ticks] = steps
        steps.requests.append(request)
        steps.names.append(name)
        steps.session_ids.append(request.session_id)
        steps.positions.append(request.position if request.HasField("position") else None)
        steps.contents.append(content)
    alike: list[AlikeSteps] = []
    for (time, width, _), steps in by_look.items():
        others += steps.finish(time, width)
        if steps.requests:
            alike.append(steps)
    return alike, others


def parse_columns(columns: Columns, max_chunk_bytes: int) -> Sorted:
    """The steps of columns that fit each other (``Columns.check``), as they are.

    Returns:
        As ``parse_requests``; where it would refuse one of them, all are requests.
    """
    ticks = 0 if columns.timeout is None else _ticks(*columns.timeout)
    _, time, width = columns.shape
    longest = max(map(len, columns.request_ids))
    if (
        columns.dtype == FLOAT32
        and 4 * time * width <= max_chunk_bytes
        and longest <= MAX_REQUEST_ID
        and ticks >= 0
        and all_finite(flat := np.frombuffer(columns.content, LITTLE_FLOAT32))
    ):
        return (ColumnSteps(columns, _seconds(ticks), flat.reshape(columns.shape)),), ()
    return (), columns.requests()


def _in_blocks(replies: Sequence[StepReply]) -> Sequence[tuple[slice, Replies]]:
    """Replies with outputs of one shape, cut into blocks of a limited size; which of them each is."""
    count = len(replies)
    if not count:
        return ()
    if not isinstance(replies, Replies):
        replies = Replies.of(replies)
    most = max(1, _BLOCK_BYTES * count // (replies.outputs.nbytes + count * _BESIDE))
    if most >= count:
        return ((slice(None), replies),)
    return [(at := slice(begin, begin + most), replies[at]) for begin in range(0, count, most)]


def _ticks(seconds: int, nanos: int) -> int:
    """A time limit, rounded up; negative where it is none."""
    ticks = seconds * _TICKS_A_SECOND - (-nanos * _TICKS_A_SECOND // 1_000_000_000)
    return ticks if ticks > 0 and nanos >= 0 else -1


def _seconds(ticks: int) -> float | None:
    return ticks / _TICKS_A_SECOND if ticks else None
