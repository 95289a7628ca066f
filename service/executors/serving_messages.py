"""Predict's requests and responses as arrays.

Tensors go out as ``tensor_content`` and come back as either that or typed fields: TensorFlow Serving answers with
``float_val`` unless it is told otherwise, and a batch of states has hundreds of thousands of them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from service.executors.serving_protos import predict_pb2, types_pb2
from service.types import FloatArray, VersionKey

_DTYPES = {
    np.dtype(np.float32): types_pb2.DT_FLOAT,
    np.dtype(np.int32): types_pb2.DT_INT32,
    np.dtype(np.bool_): types_pb2.DT_BOOL,
}
LITTLE_FLOAT = np.dtype("<f4")
_FLOAT_VAL_KEY = bytes([5 << 3 | 2])  # field 5 of tensor.proto, with a length


class MessageError(Exception):
    """The response is not what its request asked for."""


class Prediction(NamedTuple):
    """A Predict response: the version that answered, and its ``TensorProto``s by output name."""

    key: VersionKey
    outputs: Mapping[str, Any]


def encode_predict(
    key: VersionKey, signature: str, inputs: Mapping[str, npt.NDArray[Any]], output_filter: Sequence[str] = ()
) -> bytes:
    """A serialized ``PredictRequest``.

    Args:
        key: The version to run on.
        signature: The signature's name.
        inputs: float32, int32 and bool arrays of any shape.
        output_filter: The outputs to return; all where empty.
    """
    request = predict_pb2.PredictRequest(output_filter=output_filter)
    request.model_spec.name = key.model
    request.model_spec.version.value = key.version
    request.model_spec.signature_name = signature
    return bytes(request.SerializeToString()) + encode_inputs(inputs)


def encode_inputs(inputs: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """The part of a serialized ``PredictRequest`` that is its inputs; the bytes of each array end what is said of it.

    Messages one behind the other are their merger
    (https://protobuf.dev/programming-guides/encoding/#last-one-wins).
    """
    request = predict_pb2.PredictRequest()
    for name, array in inputs.items():
        tensor = request.inputs[name]
        tensor.dtype = _DTYPES[array.dtype]
        tensor.tensor_shape.SetInParent()
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        tensor.tensor_content = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    return bytes(request.SerializeToString())


def decode_predict(response: bytes) -> Prediction:
    """Parses a serialized ``PredictResponse``.

    Raises:
        MessageError: it is not one.
    """
    try:
        message = predict_pb2.PredictResponse.FromString(response)
    except DecodeError as error:
        raise MessageError(f"not a PredictResponse: {error}") from None
    return Prediction(VersionKey(message.model_spec.name, message.model_spec.version.value), message.outputs)


def float_output(prediction: Prediction, name: str, shape: tuple[int | None, ...]) -> FloatArray:
    """One output, the caller's own. None in ``shape`` stands for any size.

    Raises:
        MessageError: it is missing, not float32, or not of ``shape``.
    """
    tensor = _output(prediction, name)
    if tensor.dtype != types_pb2.DT_FLOAT:
        raise MessageError(f"output {name!r} is {_dtype_name(tensor.dtype)}; expected DT_FLOAT")
    came = tuple(dim.size for dim in tensor.tensor_shape.dim)
    if len(came) != len(shape) or any(size not in (None, got) for size, got in zip(shape, came, strict=True)):
        raise MessageError(f"output {name!r} has shape {list(came)}; expected {list(shape)}")
    values = _content_floats(tensor.tensor_content) if tensor.tensor_content else _typed_floats(tensor)
    if min(came, default=0) < 0 or values is None or len(values) != math.prod(came):
        raise MessageError(f"output {name!r} does not hold the values of its shape {list(came)}")
    return values.reshape(came)


def _content_floats(content: bytes) -> FloatArray | None:
    if len(content) % LITTLE_FLOAT.itemsize:
        return None
    return np.frombuffer(content, LITTLE_FLOAT).astype(np.float32)


def _typed_floats(tensor: Any) -> FloatArray:
    """``float_val`` as an array.

    Not every release of protobuf gives NumPy the buffer, and item by item takes a hundred times as long. But written
    out again, which is fast in all of them, the values are the last bytes: a packed field is one run of little-endian
    floats (https://protobuf.dev/programming-guides/encoding/#packed), and no field behind it is set.
    """
    count = len(tensor.float_val)
    written = tensor.SerializeToString()
    start = len(written) - count * LITTLE_FLOAT.itemsize
    head = _FLOAT_VAL_KEY + _varint(count * LITTLE_FLOAT.itemsize)
    if count and written[max(start - len(head), 0) : start] == head:
        return np.frombuffer(written, LITTLE_FLOAT, count, start).astype(np.float32)
    return np.array(tensor.float_val, np.float32)


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


def string_output(prediction: Prediction, name: str) -> bytes:
    """An output that is one string.

    Raises:
        MessageError: it is missing or something else.
    """
    tensor = _output(prediction, name)
    if tensor.dtype != types_pb2.DT_STRING:
        raise MessageError(f"output {name!r} is {_dtype_name(tensor.dtype)}; expected DT_STRING")
    if tensor.tensor_content:
        return _content_string(name, tensor.tensor_content)
    if len(tensor.string_val) != 1:
        raise MessageError(f"output {name!r} has {len(tensor.string_val)} strings; expected one")
    return bytes(tensor.string_val[0])


def _content_string(name: str, content: bytes) -> bytes:
    """TensorFlow's own form of one string in ``tensor_content``: its length as a varint, then its bytes."""
    length = 0
    for index, byte in enumerate(content[:10]):
        length |= (byte & 0x7F) << 7 * index
        if byte < 0x80:
            text = content[index + 1 :]
            if len(text) == length:
                return text
            break
    raise MessageError(f"output {name!r} is not one string")


def _output(prediction: Prediction, name: str) -> Any:
    if name not in prediction.outputs:
        raise MessageError(f"output {name!r} is missing; got {sorted(prediction.outputs)}")
    return prediction.outputs[name]


def _dtype_name(dtype: int) -> str:
    return str(types_pb2.DataType.Name(dtype)) if dtype in types_pb2.DataType.values() else f"dtype {dtype}"
