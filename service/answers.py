"""What the steps of a stream came to, as bytes."""

from collections.abc import Sequence

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.codec import FLOAT32, LITTLE_FLOAT32
from service.sessions.cohort import Replies
from service.step_stream import Answer
from service.types import FloatArray, StepReply

_WRITTEN_BYTES = 256 * 1024
# About what a response has beside its outputs.
_BESIDE = 100


class Answers:
    """Serialises the replies of steps, always with the same three messages.

    To make one for each takes twice as long, and blocks of memory (see ``arenas``). What is written into a message
    stays in its memory until it goes, so these are made anew every now and then.

    Args:
        written_bytes: After so many, written into all of them.
    """

    def __init__(self, written_bytes: int = _WRITTEN_BYTES) -> None:
        self._most = self._left = written_bytes
        self._shape: tuple[int, ...] = ()
        self._rows: list[tuple[pb.StepResponse, tensor_pb2.Tensor]] = []
        self._rows_shape: tuple[int, ...] = ()
        self._begin()

    def of(self, request_id: str, session_id: str, reply: StepReply) -> bytes:
        """The response of one step, ``codec.render_reply`` in a message of the stream."""
        response = self._response
        response.request_id, response.session_id, response.position = request_id, session_id, reply.position
        shape = reply.outputs.shape
        if shape != self._shape:
            self._shape = shape
            self._outputs.shape[:] = shape
        self._outputs.content = _content(reply.outputs)
        data = self._single.SerializeToString()
        self._written(len(data))
        return data

    def of_requests(self, request_ids: Sequence[str], session_ids: Sequence[str], replies: Replies) -> Answer:
        """The responses of steps that came as requests, one at the least, each as ``of`` makes it."""
        count, shape = len(request_ids), replies.outputs.shape[1:]
        rows = self._rows
        if len(rows) != count or shape != self._rows_shape:
            self._resize(count, shape)
        content = _content(replies.outputs) if replies.content is None else replies.content
        size, begin = len(content) // count, 0
        for (response, outputs), request_id, session_id, position in zip(
            rows, request_ids, session_ids, replies.positions, strict=True
        ):
            response.request_id, response.session_id, response.position = request_id, session_id, position
            outputs.content = content[begin : begin + size]
            begin += size
        data = self._several.SerializeToString()
        self._written(len(data), count)
        return Answer(data, count)

    def _resize(self, count: int, shape: tuple[int, ...]) -> None:
        """Has the message of several responses have so many, with outputs of this shape."""
        rows = self._rows
        del rows[count:], self._several.responses[count:]
        if shape != self._rows_shape:
            self._rows_shape = shape
            for _, outputs in rows:
                outputs.shape[:] = shape
        for _ in range(count - len(rows)):
            response = self._several.responses.add()
            outputs = response.outputs
            outputs.dtype = FLOAT32
            outputs.shape[:] = shape
            rows.append((response, outputs))

    def of_columns(self, request_ids: Sequence[str], replies: Replies) -> Answer:
        """The results of steps that came as columns."""
        results = self._results
        results.request_ids[:] = request_ids
        results.positions[:] = replies.positions
        results.outputs.shape[:] = replies.outputs.shape
        results.outputs.content = _content(replies.outputs) if replies.content is None else replies.content
        data = self._columns.SerializeToString()
        self._written(len(data))
        return Answer(data, len(request_ids))

    def _begin(self) -> None:
        self._left = self._most
        self._single, self._columns = pb.StreamStepsResponse(), pb.StreamStepsResponse()
        self._several = pb.StreamStepsResponse()
        self._rows = []  # of that: each response, and its outputs
        self._response, self._results = self._single.responses.add(), self._columns.columns.add()
        self._outputs = self._response.outputs
        self._outputs.dtype = self._results.outputs.dtype = FLOAT32
        self._shape = ()

    def _written(self, size: int, responses: int = 1) -> None:
        self._left -= size + responses * _BESIDE
        if self._left <= 0:
            self._begin()


def _content(outputs: FloatArray) -> bytes:
    return outputs.astype(LITTLE_FLOAT32, copy=False).tobytes()
