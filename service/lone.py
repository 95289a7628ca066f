"""Messages of one step and nothing else, which is what most connections send: parsed as the step that they are."""

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.arenas import Arena

_BYTES = 2  # the wire type of what has a length
_TAG = pb.StreamStepsRequest.REQUESTS_FIELD_NUMBER << 3 | _BYTES
# Past that the length of the step takes three bytes, and what stands around it hardly shows.
_MOST_BYTES = 1 << 14


class StreamMessages:
    """Parses the messages of a stream; of those that are one step, the step alone.

    Neither the message nor its list is made for it, and nobody has to ask what else there is in it.

    Args:
        max_bytes: A longer message is parsed as one in any case.
    """

    def __init__(self, max_bytes: int = _MOST_BYTES) -> None:
        self._most = min(max_bytes, _MOST_BYTES)
        self._parse = Arena(pb.StreamStepsRequest).parse
        self._parse_step = Arena(pb.StepRequest).parse

    def parse(self, data: bytes) -> pb.StreamStepsRequest | pb.StepRequest:
        """The message that is serialised in ``data``.

        Raises:
            DecodeError: none is.
        """
        size = len(data)
        if 2 < size <= self._most and data[0] == _TAG:
            length, begin = data[1], 2
            if length & 0x80 and not data[2] & 0x80:
                length, begin = length & 0x7F | data[2] << 7, 3
            if begin + length == size:
                return self._parse_step(data[begin:])
        return self._parse(data)
