"""Predict requests and answers as bytes."""

import numpy as np
import pytest

from service.executors.serving_messages import decode_predict, encode_predict, float_output
from service.executors.serving_protos import predict_pb2
from tests.service.executors.fake_model_server import reply
from tests.service.executors.sequence_models import WIDTH, random_batch
from tests.service.executors.tf_serving import TWO


def test_requests_carry_tensor_content() -> None:
    batch = random_batch(2, 3)
    inputs = {"inputs": batch.inputs, "lengths": batch.lengths, "reset": batch.reset, "state": batch.state[::-1]}
    request = predict_pb2.PredictRequest.FromString(encode_predict(TWO, "step", inputs, ["state"]))
    assert (request.model_spec.name, request.model_spec.version.value) == ("sums", 2)
    assert list(request.output_filter) == ["state"]
    assert [dim.size for dim in request.inputs["inputs"].tensor_shape.dim] == [2, 3, WIDTH]
    assert request.inputs["state"].tensor_content == np.ascontiguousarray(batch.state[::-1]).tobytes()
    assert request.inputs["reset"].dtype == 10
    assert not request.inputs["inputs"].float_val


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 4096, 164_000])
@pytest.mark.parametrize("extra", ["", "half_val", "int_val", "float8_val"])
def test_typed_floats_are_read_whole_whatever_stands_beside_them(count: int, extra: str) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    response = reply(predict_pb2.PredictRequest(), state=values)
    tensor = response.outputs["state"]
    if extra == "float8_val":
        tensor.float8_val = b"1234"
    elif extra:
        getattr(tensor, extra).extend([1, 2, 3])
    prediction = decode_predict(response.SerializeToString())
    came = float_output(prediction, "state", (count,))
    np.testing.assert_array_equal(came, values)
    assert came.flags.writeable
