"""TensorProto to NumPy and back, by the rules of TensorFlow's ``Tensor::FromProto`` and ``Tensor::AsProtoField``.

What surprises: a list of values shorter than the shape repeats its last value, an empty one means zeros, and what is
too long is cut; ``tensor_content`` must have exactly the right size; an unknown rank counts as a scalar.
"""

import math
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import numpy.typing as npt
from tensorflow.core.framework import types_pb2

Array = npt.NDArray[Any]


class TensorError(Exception):
    """The proto does not describe a tensor."""


class _Typed(NamedTuple):
    """How a type's values stand in their repeated field: each element is one value of ``stored`` or more."""

    dtype: np.dtype[Any]
    field: str
    stored: np.dtype[Any]
    packed_tag: int | None = None  # set where the packed field's bytes are the array's bytes


def _typed(dtype: Any, field: str, stored: Any = None, packed_tag: int | None = None) -> _Typed:
    return _Typed(np.dtype(dtype), field, np.dtype(dtype if stored is None else stored), packed_tag)


def _quantized(name: str, stored: Any) -> _Typed:
    """TensorFlow's NumPy form of a quantized integer: a record with one field."""
    return _typed(np.dtype([(name, stored)]), "int_val", stored)


_TYPES = {
    types_pb2.DT_FLOAT: _typed(np.float32, "float_val", packed_tag=5),
    types_pb2.DT_DOUBLE: _typed(np.float64, "double_val", packed_tag=6),
    types_pb2.DT_INT32: _typed(np.int32, "int_val"),
    types_pb2.DT_INT16: _typed(np.int16, "int_val", np.int32),
    types_pb2.DT_UINT16: _typed(np.uint16, "int_val", np.int32),
    types_pb2.DT_INT8: _typed(np.int8, "int_val", np.int32),
    types_pb2.DT_UINT8: _typed(np.uint8, "int_val", np.int32),
    types_pb2.DT_INT64: _typed(np.int64, "int64_val"),
    types_pb2.DT_UINT32: _typed(np.uint32, "uint32_val"),
    types_pb2.DT_UINT64: _typed(np.uint64, "uint64_val"),
    types_pb2.DT_BOOL: _typed(np.bool_, "bool_val"),
    types_pb2.DT_HALF: _typed(np.float16, "half_val", np.uint16),
    types_pb2.DT_BFLOAT16: _typed(ml_dtypes.bfloat16, "half_val", np.uint16),
    types_pb2.DT_COMPLEX64: _typed(np.complex64, "scomplex_val", np.float32, 9),
    types_pb2.DT_COMPLEX128: _typed(np.complex128, "dcomplex_val", np.float64, 12),
    types_pb2.DT_QINT8: _quantized("qint8", np.int8),
    types_pb2.DT_QUINT8: _quantized("quint8", np.uint8),
    types_pb2.DT_QINT16: _quantized("qint16", np.int16),
    types_pb2.DT_QUINT16: _quantized("quint16", np.uint16),
    types_pb2.DT_QINT32: _quantized("qint32", np.int32),
}
# Types whose stored integers are the bits of the value, and types whose values are stored as pairs.
_BITS = frozenset(
    {
        types_pb2.DT_HALF,
        types_pb2.DT_BFLOAT16,
        types_pb2.DT_QINT8,
        types_pb2.DT_QUINT8,
        types_pb2.DT_QINT16,
        types_pb2.DT_QUINT16,
        types_pb2.DT_QINT32,
    }
)
_PAIRS = frozenset({types_pb2.DT_COMPLEX64, types_pb2.DT_COMPLEX128})
_MAX_RANK = 254


def from_proto(proto: Any) -> Array:
    """The tensor that a ``TensorProto`` describes; it may share the proto's bytes.

    Raises:
        TensorError: wrong size, a negative dimension, or a type that cannot be sent.
    """
    shape = _shape(proto)
    count = math.prod(shape)
    if proto.dtype == types_pb2.DT_STRING:
        return _strings(proto, count).reshape(shape)
    typed = _TYPES.get(proto.dtype)
    if typed is None:
        raise TensorError(f"dtype {proto.dtype} cannot be sent")
    if count == 0:
        return np.empty(shape, typed.dtype)
    if proto.tensor_content:
        if len(proto.tensor_content) != count * typed.dtype.itemsize:
            raise TensorError(f"{len(proto.tensor_content)} bytes for {count} elements of {typed.dtype}")
        if proto.dtype == types_pb2.DT_BOOL and max(proto.tensor_content) > 1:
            raise TensorError("a bool is neither 0 nor 1")
        return np.frombuffer(proto.tensor_content, typed.dtype).reshape(shape)
    return _values(proto, typed, count).reshape(shape)


def to_proto(array: Array, dtype: int, proto: Any, *, as_content: bool = False) -> None:
    """Writes an array into an empty ``TensorProto``: typed fields, or ``tensor_content`` where asked."""
    proto.dtype = dtype
    shape = proto.tensor_shape
    for size in array.shape:
        shape.dim.add(size=size)
    shape.SetInParent()
    if dtype == types_pb2.DT_STRING:
        values: list[bytes] = array.ravel().tolist()
        if as_content:
            proto.tensor_content = b"".join([*(_varint(len(value)) for value in values), *values])
        else:
            proto.string_val.extend(values)
        return
    typed = _TYPES.get(dtype)
    if typed is None:
        raise TensorError(f"dtype {dtype} cannot be sent")
    array = np.ascontiguousarray(array)
    if not array.size:
        return
    if as_content:
        proto.tensor_content = array.tobytes()
    elif typed.packed_tag is not None:
        # A packed field of fixed-width values is the array's own bytes: no loop over the items.
        data = array.tobytes()
        proto.MergeFromString(_varint(typed.packed_tag << 3 | 2) + _varint(len(data)) + data)
    else:
        stored = array.view(typed.stored) if dtype in _BITS else array
        getattr(proto, typed.field).extend(stored.ravel().tolist())


def _shape(proto: Any) -> tuple[int, ...]:
    shape = tuple(dim.size for dim in proto.tensor_shape.dim)
    if len(shape) > _MAX_RANK or any(size < 0 for size in shape):
        raise TensorError(f"shape {list(shape)}")
    if math.prod(size for size in shape if size) >= 2**63:
        raise TensorError(f"shape {list(shape)} has too many elements")
    return shape


def _values(proto: Any, typed: _Typed, count: int) -> Array:
    values = np.asarray(getattr(proto, typed.field)).astype(typed.stored, copy=False)
    if proto.dtype in _PAIRS:
        values = values[: len(values) // 2 * 2].view(typed.dtype)
    elif proto.dtype in _BITS:
        values = values.view(typed.dtype)
    else:
        values = values.astype(typed.dtype, copy=False)
    if len(values) >= count:
        return values[:count]
    try:
        filled = np.zeros(count, typed.dtype)
    except MemoryError:
        raise TensorError(f"{count} elements of {typed.dtype} do not fit into memory") from None
    if len(values):
        filled[: len(values)] = values
        filled[len(values) :] = values[-1]
    return filled


def _strings(proto: Any, count: int) -> Array:
    values = _string_content(proto.tensor_content, count) if proto.tensor_content and count else list(proto.string_val)
    values = values[:count]
    values.extend([values[-1] if values else b""] * (count - len(values)))
    array = np.empty(count, object)
    array[:] = values
    return array


def _string_content(content: bytes, count: int) -> list[bytes]:
    """Strings in ``tensor_content``: all lengths as varints, then all bytes."""
    lengths = []
    offset = 0
    for _ in range(count):
        length = shift = 0
        while True:
            if offset >= len(content) or shift > 63:
                raise TensorError("string lengths are cut off")
            byte = content[offset]
            offset += 1
            length |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        lengths.append(length)
    if offset + sum(lengths) != len(content):
        raise TensorError("string lengths do not fit their bytes")
    values = []
    for length in lengths:
        values.append(content[offset : offset + length])
        offset += length
    return values


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
