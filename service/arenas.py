"""Small messages that share their memory.

A message of protobuf's has memory of its own, in blocks, and each ten-thousandth block that is freed in a process has
the C library give free memory back to the system (upb, ``python/protobuf.c``). That takes the event loop 6 to 12 ms in
a process that has compiled models, whose heaps are full of holes, and with a few blocks for each message of a single
step it comes several times a second (docs/design.md). Elements of a repeated field have the memory of the message that
they are in.
"""

from typing import Any, Generic, TypeVar

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message

_M = TypeVar("_M", bound=Message)

# So many messages share their memory at the most, and so many bytes: what is kept for the sake of one of them is some
# kilobytes.
_SHARED, _SHARED_BYTES = 16, 16 * 1024


class Arena(Generic[_M]):
    """Makes messages of one type. They are as any others, and may be kept for any time.

    Args:
        kind: The type.
    """

    def __init__(self, kind: type[_M]) -> None:
        self._kind = kind
        self._holder = _holder_of(kind)
        self._messages: Any = None
        self._left = self._room = 0

    def parse(self, data: bytes) -> _M:
        """The message that is serialised in ``data``.

        Raises:
            DecodeError: none is.
        """
        size = len(data)
        if size > _SHARED_BYTES // 2:
            return self._kind.FromString(data)
        if not self._left or size > self._room:
            self._messages, self._left, self._room = self._holder().messages, _SHARED, _SHARED_BYTES
        self._left -= 1
        self._room -= size
        message: _M = self._messages.add()
        message.MergeFromString(data)
        return message


def _holder_of(kind: type[Message]) -> type[Any]:
    """A message type with one field, ``messages``, a repeated one of ``kind``."""
    held, pool = kind.DESCRIPTOR, descriptor_pool.Default()
    file = descriptor_pb2.FileDescriptorProto(
        name=f"arena/{held.full_name}.proto", package="arena", dependency=[held.file.name], syntax="proto3"
    )
    holder = file.message_type.add(name=held.full_name.replace(".", "_"))
    field = descriptor_pb2.FieldDescriptorProto
    holder.field.add(
        name="messages",
        number=1,
        label=field.LABEL_REPEATED,
        type=field.TYPE_MESSAGE,
        type_name=f".{held.full_name}",
    )
    # The same again, for another arena, is nothing new to the pool.
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"arena.{holder.name}"))
