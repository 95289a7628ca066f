"""The requests that a model server runs before it serves a version, so that no client waits for what is made once."""

from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2


def write_warmup(
    file: Path, *, name: str, input_dim: int, state_size: int, batches: Sequence[int], times: Sequence[int]
) -> None:
    """Writes ``tf_serving_warmup_requests``: a TFRecord file of ``PredictionLog``, one for each batch shape.

    Args:
        file: Where to.
        name: The model's name.
        input_dim: Width of its inputs.
        state_size: Width of its state row.
        batches: How many rows.
        times: How many time steps.
    """
    with tf.io.TFRecordWriter(str(file)) as writer:
        for batch in batches:
            for time in times:
                request = _step_request(name, input_dim, state_size, batch, time)
                log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
                writer.write(log.SerializeToString())


def _step_request(name: str, input_dim: int, state_size: int, batch: int, time: int) -> predict_pb2.PredictRequest:
    request = predict_pb2.PredictRequest()
    request.model_spec.name = name
    request.model_spec.signature_name = "step"
    for key, dtype, shape, field, value in (
        ("inputs", tf.float32, (batch, time, input_dim), "float_val", 0.0),
        ("lengths", tf.int32, (batch,), "int_val", time),
        ("reset", tf.bool, (batch,), "bool_val", True),
        ("state", tf.float32, (batch, state_size), "float_val", 0.0),
    ):
        tensor = request.inputs[key]
        tensor.dtype = dtype.as_datatype_enum
        for size in shape:
            tensor.tensor_shape.dim.add(size=size)
        # One value stands for all of them, so that the file stays small.
        getattr(tensor, field).append(value)
    return request
