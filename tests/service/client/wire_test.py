import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.client import wire
from service.codec import parse_inputs, parse_timeout


@given(
    array=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2),
        elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False),
    ),
    timeout=st.floats(1e-3, 1e6),
)
def test_the_gateway_reads_what_the_client_writes(array, timeout):
    request = pb.StepRequest()
    wire.fill_step(
        request,
        request_id="7",
        session_id="a",
        position=3,
        shape=array.shape,
        content=array.tobytes(),
        timeout=timeout,
    )
    again = pb.StepRequest.FromString(request.SerializeToString())
    read, _ = parse_inputs(again.inputs, 1000)
    np.testing.assert_array_equal(read, array)
    assert parse_timeout(again) == pytest.approx(timeout, abs=1e-8)
    assert (again.request_id, again.session_id, again.position) == ("7", "a", 3)


@pytest.mark.parametrize(
    "inputs",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], np.float64),
        np.array([[1, 2], [3, 4]], ">f4"),
        np.array([[1, 2], [3, 4]]),
    ],
)
def test_real_numbers_of_any_kind_become_float32(inputs):
    array = wire.as_inputs(inputs)
    assert array.dtype == np.dtype("<f4")
    assert array.tolist() == [[1, 2], [3, 4]]


def test_booleans_are_bits():
    assert wire.as_inputs(np.array([[True, False]])).tolist() == [[1, 0]]


@pytest.mark.parametrize("inputs", [np.zeros((1, 2), complex), [["a"]], [[None]]])
def test_what_is_not_a_real_number_is_refused(inputs):
    with pytest.raises(TypeError, match="expected real numbers"):
        wire.as_inputs(inputs)


def test_outputs_belong_to_the_caller():
    response = pb.StepResponse(position=1, outputs=tensor_pb2.Tensor(dtype=1, shape=[1, 2], content=bytes(8)))
    outputs = wire.to_outputs(response, 1)
    outputs += 1
    assert outputs.tolist() == [[1, 1]]


@pytest.mark.parametrize(
    "tensor",
    [
        tensor_pb2.Tensor(dtype=0, shape=[1, 2], content=bytes(8)),
        tensor_pb2.Tensor(dtype=1, shape=[1, 3], content=bytes(8)),
        tensor_pb2.Tensor(dtype=1, shape=[1, 2], content=bytes(7)),
    ],
)
def test_a_tensor_whose_parts_do_not_fit_is_refused(tensor):
    with pytest.raises(ValueError, match=r"expected|reshape|multiple"):
        wire.to_array(tensor)


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_time_limit_is_positive_and_finite(timeout):
    with pytest.raises(ValueError, match="timeout is"):
        wire.check_timeout(timeout, 60)
    assert wire.check_timeout(None, 60) == 60
