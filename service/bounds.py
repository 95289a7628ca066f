"""What becomes of a message that should not be parsed, or cannot be.

A few bytes on the wire may become a hundred times as many in memory: an empty step takes two bytes of a message and a
hundred once parsed, so a message within its size limit could still take gigabytes. Counting the fields of the outermost
message bounds that: everything below takes about the room that it has on the wire.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError

from service.errors import InvalidArgument, MessageTooLarge, ServiceError

# The most steps of one message.
MAX_MESSAGE_STEPS = 16_384
# A message of that size can do no harm, whatever is in it.
_HARMLESS_BYTES = 64 * 1024
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Unparsed:
    """Stands in for a message that was not parsed. It has no step that could be refused by itself.

    Attributes:
        error: Makes what its sender is told. An error that is raised holds who raised it, and so would hold this.
    """

    requests = columns = ()

    def __init__(self, error: Callable[[], ServiceError]) -> None:
        self.error = error


class TooLarge:
    """Stands in for a message of too many bytes, whose steps can be refused each by itself.

    Attributes:
        error: As of ``Unparsed``.
    """

    def __init__(self, message: Any, error: Callable[[], ServiceError]) -> None:
        self._message = message
        self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


def bounded(parse: Callable[[bytes], Any], max_fields: int, max_bytes: int) -> Callable[[bytes], Any]:
    """``parse``, except that what should not be taken becomes what stands in for it.

    Here the bytes can be counted. Of a message they cannot: upb makes them all anew to tell how many they are.

    Args:
        parse: Makes the message.
        max_fields: With more than that, or if it is no message, it becomes ``Unparsed``.
        max_bytes: With more than that, ``TooLarge``. It is below the transport's own limit.
    """

    def parse_bounded(data: bytes) -> Any:
        if len(data) > _HARMLESS_BYTES and has_more_fields(data, max_fields):
            return Unparsed(partial(MessageTooLarge, f"the message has more than {max_fields} steps", limit=max_fields))
        try:
            message = parse(data)
        except DecodeError as error:
            return Unparsed(partial(InvalidArgument, f"the message cannot be read: {error}", field=""))
        if len(data) > max_bytes:
            what = f"the message has {len(data)} bytes; at most {max_bytes} are taken"
            return TooLarge(message, partial(MessageTooLarge, what, limit=max_bytes))
        return message

    return parse_bounded


def check_bounds(message: object) -> None:
    """Raises what is wrong with a message that something stands in for.

    Raises:
        MessageTooLarge: it has more bytes than are taken, or more steps than are parsed.
        InvalidArgument: it cannot be read.
    """
    if isinstance(message, Unparsed | TooLarge):
        raise message.error()


def has_more_fields(data: bytes, limit: int) -> bool:
    """Whether the outermost message in ``data`` has more than ``limit`` fields. What is no message has none."""
    at, count, end = 0, 0, len(data)
    try:
        while at < end:
            count += 1
            if count > limit:
                return True
            tag, at = _varint(data, at)
            kind = tag & 7
            if kind == _BYTES:
                length, at = _varint(data, at)
                at += length
            elif kind == _VARINT:
                _, at = _varint(data, at)
            elif kind == _FIXED64:
                at += 8
            elif kind == _FIXED32:
                at += 4
            # Groups have no length: what is inside of them counts as well.
    except IndexError:  # it ends too soon: the parser will say so
        return False
    return False


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """The number at ``at``, and where it ends."""
    byte = data[at]
    if byte < 0x80:
        return byte, at + 1
    value, shift = byte & 0x7F, 7
    while True:
        at += 1
        byte = data[at]
        value |= (byte & 0x7F) << shift
        if byte < 0x80 or shift > 63:
            return value, at + 1
        shift += 7
