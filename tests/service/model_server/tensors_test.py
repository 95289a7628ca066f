"""TensorProto conversion against TensorFlow's own: ``parse_tensor`` is C++'s Tensor::FromProto."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorflow.core.framework import tensor_pb2, types_pb2

from service.model_server.tensors import TensorError, from_proto, to_proto

NUMERIC: dict[int, Any] = {
    types_pb2.DT_FLOAT: np.float32,
    types_pb2.DT_DOUBLE: np.float64,
    types_pb2.DT_HALF: np.float16,
    types_pb2.DT_BFLOAT16: ml_dtypes.bfloat16,
    types_pb2.DT_INT8: np.int8,
    types_pb2.DT_UINT8: np.uint8,
    types_pb2.DT_INT16: np.int16,
    types_pb2.DT_UINT16: np.uint16,
    types_pb2.DT_INT32: np.int32,
    types_pb2.DT_UINT32: np.uint32,
    types_pb2.DT_INT64: np.int64,
    types_pb2.DT_UINT64: np.uint64,
    types_pb2.DT_BOOL: np.bool_,
    types_pb2.DT_COMPLEX64: np.complex64,
    types_pb2.DT_COMPLEX128: np.complex128,
    types_pb2.DT_QINT8: tf.qint8.as_numpy_dtype,
    types_pb2.DT_QUINT8: tf.quint8.as_numpy_dtype,
    types_pb2.DT_QINT16: tf.qint16.as_numpy_dtype,
    types_pb2.DT_QUINT16: tf.quint16.as_numpy_dtype,
    types_pb2.DT_QINT32: tf.qint32.as_numpy_dtype,
}
FIELDS = {
    types_pb2.DT_FLOAT: "float_val",
    types_pb2.DT_DOUBLE: "double_val",
    types_pb2.DT_HALF: "half_val",
    types_pb2.DT_BFLOAT16: "half_val",
    types_pb2.DT_INT8: "int_val",
    types_pb2.DT_UINT8: "int_val",
    types_pb2.DT_INT16: "int_val",
    types_pb2.DT_UINT16: "int_val",
    types_pb2.DT_INT32: "int_val",
    types_pb2.DT_UINT32: "uint32_val",
    types_pb2.DT_INT64: "int64_val",
    types_pb2.DT_UINT64: "uint64_val",
    types_pb2.DT_BOOL: "bool_val",
    types_pb2.DT_COMPLEX64: "scomplex_val",
    types_pb2.DT_COMPLEX128: "dcomplex_val",
    types_pb2.DT_QINT8: "int_val",
    types_pb2.DT_QUINT8: "int_val",
    types_pb2.DT_QINT16: "int_val",
    types_pb2.DT_QUINT16: "int_val",
    types_pb2.DT_QINT32: "int_val",
}
SHAPES = [(), (1,), (3,), (2, 3), (0,), (2, 0, 3)]


def tensorflows(proto: Any) -> Any:
    value = tf.io.parse_tensor(proto.SerializeToString(), tf.dtypes.as_dtype(proto.dtype)).numpy()
    if isinstance(value, bytes):
        return np.array(value, object)
    kind = np.dtype(NUMERIC.get(proto.dtype, object))
    return np.asarray(value).view(kind) if kind.names else value  # eager tensors show quantized integers as plain ones


def sample(dtype: int, shape: tuple[int, ...]) -> Any:
    random = np.random.default_rng(dtype)
    kind = np.dtype(NUMERIC[dtype])
    if kind.names:  # a quantized integer
        return random.integers(0, 100, shape).astype(kind[0].base).view(kind)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return random.integers(info.min, info.max, shape, dtype=kind, endpoint=True)
    if kind.kind == "b":
        return random.random(shape) < 0.5
    values = random.standard_normal(shape)
    return (values + 1j * random.standard_normal(shape) if kind.kind == "c" else values).astype(kind)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", NUMERIC, ids=types_pb2.DataType.Name)
@pytest.mark.parametrize("as_content", [False, True], ids=["typed", "content"])
def test_numbers_go_there_and_back(dtype: int, shape: tuple[int, ...], as_content: bool) -> None:
    array = np.asarray(sample(dtype, shape))
    proto = tensor_pb2.TensorProto()
    to_proto(array, dtype, proto, as_content=as_content)
    assert bool(proto.tensor_content) == (as_content and array.size > 0)
    assert len(getattr(proto, FIELDS[dtype])) == (
        0 if as_content else array.size * (2 if array.dtype.kind == "c" else 1)
    )
    parsed = tensor_pb2.TensorProto.FromString(proto.SerializeToString())
    for came in (from_proto(parsed), tensorflows(parsed)):
        assert came.shape == shape
        assert came.dtype == array.dtype
        np.testing.assert_array_equal(came, array)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("as_content", [False, True], ids=["typed", "content"])
def test_strings_go_there_and_back(shape: tuple[int, ...], as_content: bool) -> None:
    array = np.empty(shape, object)
    array.ravel()[:] = [b"a" * (100 * index) + bytes([index]) for index in range(array.size)]
    array = np.array(array.tolist() or b"text", object).reshape(shape) if shape == () else array
    proto = tensor_pb2.TensorProto()
    to_proto(array, types_pb2.DT_STRING, proto, as_content=as_content)
    for came in (from_proto(proto), tensorflows(proto)):
        assert came.shape == shape
        assert came.tolist() == array.tolist()


@pytest.mark.parametrize("dtype", NUMERIC, ids=types_pb2.DataType.Name)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 9])
def test_lists_too_short_or_too_long_are_read_as_tensorflow_reads_them(dtype: int, count: int) -> None:
    proto = tensor_pb2.TensorProto(dtype=dtype)
    for size in (2, 2):
        proto.tensor_shape.dim.add(size=size)
    getattr(proto, FIELDS[dtype]).extend(
        [bool(index % 2) if "bool" in FIELDS[dtype] else index + 1 for index in range(count)]
    )
    np.testing.assert_array_equal(from_proto(proto), tensorflows(proto))


@given(
    st.binary(max_size=40),
    st.lists(st.integers(-1, 3), max_size=3),
    st.sampled_from([*NUMERIC, types_pb2.DT_STRING, 0, 21, 99]),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_content_is_refused_exactly_where_tensorflow_refuses_it(
    content: bytes, shape: list[int], dtype: int, unknown_rank: bool
) -> None:
    proto = tensor_pb2.TensorProto(dtype=dtype, tensor_content=content)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    proto.tensor_shape.unknown_rank = unknown_rank
    try:
        wanted = tensorflows(proto)
    except (tf.errors.InvalidArgumentError, TypeError):
        with pytest.raises(TensorError):
            from_proto(proto)
        return
    came = from_proto(proto)
    assert came.shape == wanted.shape
    assert came.tobytes() == wanted.tobytes() if came.dtype != object else came.tolist() == wanted.tolist()


@pytest.mark.parametrize("shape", [(2**62, 4), (-1,), (3, -2), (1,) * 255])
def test_impossible_shapes_are_refused(shape: tuple[int, ...]) -> None:
    proto = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT)
    for size in shape:
        proto.tensor_shape.dim.add(size=size)
    with pytest.raises(TensorError):
        from_proto(proto)
