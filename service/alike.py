"""Steps of one message that look alike, and their results: as many at a time as there are.

They came as requests or as columns (``StepColumns``), and are answered as they came.
"""

import hashlib
from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
from google.protobuf.duration_pb2 import Duration

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.codec import FLOAT32, LITTLE_FLOAT32, MAX_REQUEST_ID, digest_prefix
from service.columns import request_of, requests_of
from service.types import FloatArray, StepReply

# Steps whose time limits differ by less than a tick may share one.
_TICKS_A_SECOND = 100
# A block of results holds about this many bytes at the most, so that messages can be made of any size above it.
_BLOCK_BYTES = 1024 * 1024


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
    def digests(self) -> Sequence[bytes]:
        """Of each one's inputs, as ``codec.parse_inputs`` makes them."""
        ...

    def request(self, place: int, /) -> pb.StepRequest:
        """One of them, by itself."""
        ...

    def render(self, message: pb.StreamStepsResponse, places: Sequence[int], replies: Sequence[StepReply], /) -> None:
        """Writes the replies of some of them into a message."""
        ...


class RequestSteps:
    """``AlikeSteps`` that came as requests."""

    __slots__ = ("contents", "digests", "inputs", "limit", "names", "positions", "prefix", "requests", "session_ids")

    def __init__(self, limit: float | None, prefix: bytes) -> None:
        self.limit = limit
        self.prefix = prefix
        self.requests: list[pb.StepRequest] = []
        self.names: list[str] = []
        self.session_ids: list[str] = []
        self.positions: list[int | None] = []
        self.contents: list[bytes] = []
        self.digests: list[bytes] = []
        self.inputs: FloatArray

    def request(self, place: int) -> pb.StepRequest:
        """See ``AlikeSteps``."""
        return self.requests[place]

    def render(self, message: pb.StreamStepsResponse, places: Sequence[int], replies: Sequence[StepReply]) -> None:
        """See ``AlikeSteps``. ``codec.render_reply`` in its place in a message: two copies less."""
        add, names, session_ids = message.responses.add, self.names, self.session_ids
        for place, (position, outputs) in zip(places, replies, strict=True):
            response = add(request_id=names[place], session_id=session_ids[place], position=position)
            tensor = response.outputs
            tensor.dtype = FLOAT32
            tensor.shape.extend(outputs.shape)
            tensor.content = outputs.astype(LITTLE_FLOAT32, copy=False).tobytes()

    def finish(self, time: int, width: int) -> Sequence[pb.StepRequest]:
        """Makes ``inputs``; returns the steps in which there is NaN or Inf, which are taken out."""
        flat = np.frombuffer(self.contents[0] if len(self.contents) == 1 else b"".join(self.contents), LITTLE_FLOAT32)
        self.inputs = inputs = flat.reshape(-1, time, width)
        if _all_finite(flat):
            return ()
        good = [at for at in range(len(inputs)) if np.isfinite(inputs[at]).all()]
        refused = [request for at, request in enumerate(self.requests) if not np.isfinite(inputs[at]).all()]
        self.requests = [self.requests[at] for at in good]
        self.names = [self.names[at] for at in good]
        self.session_ids = [self.session_ids[at] for at in good]
        self.positions = [self.positions[at] for at in good]
        self.digests = [self.digests[at] for at in good]
        self.inputs = inputs[good]
        return refused


class ColumnSteps:
    """``AlikeSteps`` that came as columns."""

    __slots__ = ("_columns", "digests", "inputs", "limit", "names", "positions", "session_ids")

    def __init__(self, columns: pb.StepColumns, limit: float | None, inputs: FloatArray, digests: list[bytes]) -> None:
        self._columns = columns
        self.limit = limit
        self.names: Sequence[str] = list(columns.request_ids)
        self.session_ids: Sequence[str] = list(columns.session_ids)
        self.positions: Sequence[int | None] = list(columns.positions)
        self.inputs = inputs
        self.digests: Sequence[bytes] = digests

    def request(self, place: int) -> pb.StepRequest:
        """See ``AlikeSteps``."""
        return request_of(self._columns, place)

    def render(self, message: pb.StreamStepsResponse, places: Sequence[int], replies: Sequence[StepReply]) -> None:
        """See ``AlikeSteps``; in blocks of a limited size."""
        names = self.names if len(places) == len(self.names) else [self.names[place] for place in places]
        block = max(1, _BLOCK_BYTES // max(1, replies[0].outputs.nbytes)) if replies else 1
        for begin in range(0, len(replies), block):
            _add_results(message, names[begin : begin + block], replies[begin : begin + block])


Sorted: TypeAlias = tuple[Sequence[AlikeSteps], Sequence[pb.StepRequest]]


def parse_requests(requests: Sequence[pb.StepRequest], max_chunk_bytes: int) -> Sorted:
    """Sorts a message's requests by the shape of their inputs and by their time limit, which it rounds up a little.

    One pass, and no call that is not needed: it is done for every step.

    Returns:
        Those that look alike, and those that ``codec.parse_step`` or ``codec.parse_timeout`` refuse.
    """
    by_look: dict[tuple[int, int, int], RequestSteps] = {}
    others: list[pb.StepRequest] = []
    for request in requests:
        tensor, name, ticks = request.inputs, request.request_id, 0
        content, sizes = tensor.content, tensor.shape
        if request.HasField("timeout"):
            ticks = _ticks(request.timeout)
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
            steps = RequestSteps(_seconds(ticks), digest_prefix(time, width))
            by_look[time, width, ticks] = steps
        steps.requests.append(request)
        steps.names.append(name)
        steps.session_ids.append(request.session_id)
        steps.positions.append(request.position if request.HasField("position") else None)
        steps.contents.append(content)
        steps.digests.append(hashlib.sha256(steps.prefix + content).digest())
    alike: list[AlikeSteps] = []
    for (time, width, _), steps in by_look.items():
        others += steps.finish(time, width)
        if steps.requests:
            alike.append(steps)
    return alike, others


def parse_columns(columns: pb.StepColumns, max_chunk_bytes: int) -> Sorted:
    """The steps of columns that fit each other (``columns.check_columns``), as they are.

    Returns:
        As ``parse_requests``; where it would refuse one of them, all are requests.
    """
    tensor, ticks = columns.inputs, 0
    if columns.HasField("timeout"):
        ticks = _ticks(columns.timeout)
    steps, time, width = tensor.shape
    size = 4 * time * width
    longest = max(map(len, columns.request_ids))
    if tensor.dtype != FLOAT32 or size > max_chunk_bytes or longest > MAX_REQUEST_ID or ticks < 0:
        return (), requests_of(columns)
    content = tensor.content
    flat = np.frombuffer(content, LITTLE_FLOAT32)
    if not _all_finite(flat):
        return (), requests_of(columns)
    prefix = digest_prefix(time, width)
    digests = [hashlib.sha256(prefix + content[at : at + size]).digest() for at in range(0, len(content), size)]
    return (ColumnSteps(columns, _seconds(ticks), flat.reshape(steps, time, width), digests),), ()


def _add_results(message: pb.StreamStepsResponse, names: Sequence[str], replies: Sequence[StepReply]) -> None:
    results = message.columns.add()
    results.request_ids.extend(names)
    results.positions.extend([reply.position for reply in replies])
    tensor = results.outputs
    tensor.dtype = FLOAT32
    tensor.shape.extend((len(replies), *replies[0].outputs.shape))
    outputs = np.concatenate([reply.outputs for reply in replies])
    tensor.content = outputs.astype(LITTLE_FLOAT32, copy=False).tobytes()


def _all_finite(flat: FloatArray) -> bool:
    # Bytes are searched faster than `all` is called, and chunks are small.
    return 0 not in np.isfinite(flat).tobytes()


def _ticks(limit: Duration) -> int:
    """A time limit, rounded up; negative where it is none."""
    ticks = limit.seconds * _TICKS_A_SECOND - (-limit.nanos * _TICKS_A_SECOND // 1_000_000_000)
    return ticks if ticks > 0 and limit.nanos >= 0 else -1


def _seconds(ticks: int) -> float | None:
    return ticks / _TICKS_A_SECOND if ticks else None
