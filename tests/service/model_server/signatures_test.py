"""Signatures beyond what was recorded: examples, defaults, warmup, and models that cannot be loaded."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf
from google.protobuf import text_format
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import (
    classification_pb2,
    inference_pb2,
    predict_pb2,
    prediction_log_pb2,
    regression_pb2,
)

from service.model_server.errors import ServingError
from service.model_server.examples import classify, multi_inference, regress
from service.model_server.manager import Handle
from service.model_server.predict import predict
from service.model_server.saved_model import SavedModel
from service.model_server.warmup import warm_up
from tests.service.model_server import recordings

CLASSIFY, REGRESS = "tensorflow/serving/classify", "tensorflow/serving/regress"


class Scorer(tf.Module):
    """Two classes and one value for each example, from its feature ``x``."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def classify(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        x = self._parse(inputs)
        return {
            "scores": tf.stack([x, 1 - x], axis=1),
            "classes": tf.tile([["yes", "no"]], [tf.shape(x)[0], 1]),
        }

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def regress(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"outputs": 10 * self._parse(inputs)}

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="inputs")])
    def wide(self, inputs: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"outputs": tf.tile(self._parse(inputs)[:, None], [1, 2])}

    def _parse(self, inputs: tf.Tensor) -> tf.Tensor:
        features = {"x": tf.io.FixedLenFeature([], tf.float32), "y": tf.io.FixedLenFeature([], tf.float32, 0.0)}
        parsed = tf.io.parse_example(inputs, features)
        return parsed["x"] + parsed["y"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Handle[SavedModel]:
    path = tmp_path_factory.mktemp("scorer") / "1"
    module = Scorer()
    signatures = {"serving_default": module.classify, "regress": module.regress, "wide": module.wide}
    tf.saved_model.save(module, str(path), signatures=signatures)
    return Handle("scorer", 1, SavedModel(path))


def examples(*values: float, context: float | None = None) -> Any:
    request = classification_pb2.ClassificationRequest()
    listed = request.input.example_list if context is None else request.input.example_list_with_context
    for value in values:
        listed.examples.add().features.feature["x"].float_list.value.append(value)
    if context is not None:
        request.input.example_list_with_context.context.features.feature["y"].float_list.value.append(context)
    return request.input


def failure(call: Any, *arguments: Any) -> str:
    with pytest.raises(ServingError) as raised:
        call(*arguments)
    return str(raised.value)


def test_classify(scorer: Handle[SavedModel]) -> None:
    response = classify(scorer, classification_pb2.ClassificationRequest(input=examples(0.25, 0.75)))
    assert (response.model_spec.name, response.model_spec.signature_name) == ("scorer", "serving_default")
    found = [[(entry.label, entry.score) for entry in row.classes] for row in response.result.classifications]
    assert found == [[("yes", 0.25), ("no", 0.75)], [("yes", 0.75), ("no", 0.25)]]


def test_regress_with_a_context(scorer: Handle[SavedModel]) -> None:
    request = regression_pb2.RegressionRequest(input=examples(0.5, 1.0, context=0.25))
    request.model_spec.signature_name = "regress"
    response = regress(scorer, request)
    assert [entry.value for entry in response.result.regressions] == [7.5, 12.5]
    assert response.model_spec.version.value == 1


def test_multi_inference(scorer: Handle[SavedModel]) -> None:
    request = inference_pb2.MultiInferenceRequest(input=examples(0.5))
    for signature, method in (("", CLASSIFY), ("regress", REGRESS)):
        task = request.tasks.add(method_name=method)
        task.model_spec.name, task.model_spec.signature_name = "scorer", signature
    # Both signatures parse the examples by themselves: that is not one input tensor.
    assert failure(multi_inference, scorer, request) == (
        "INVALID_ARGUMENT: Input tensor must be the same for all Signatures."
    )
    del request.tasks[0]
    [result] = multi_inference(scorer, request).results
    assert [entry.value for entry in result.regression_result.regressions] == [5.0]
    assert result.model_spec.signature_name == "regress"
    request.tasks.add().CopyFrom(request.tasks[0])
    assert failure(multi_inference, scorer, request) == "INVALID_ARGUMENT: Duplicate evaluation of signature: regress"
    request.tasks[1].model_spec.signature_name = "wide"
    request.tasks[1].method_name = "x"
    assert failure(multi_inference, scorer, request) == "UNIMPLEMENTED: Unsupported signature method_name: x"
    request.tasks[1].model_spec.name = "other"
    assert failure(multi_inference, scorer, request) == (
        "INVALID_ARGUMENT: All ModelSpecs in a MultiInferenceRequest must access the same model name."
    )


def test_examples_that_do_not_fit(scorer: Handle[SavedModel]) -> None:
    request = classification_pb2.ClassificationRequest()
    assert failure(classify, scorer, request) == "INVALID_ARGUMENT: Input is empty."
    request.model_spec.signature_name = "nosig"
    assert failure(classify, scorer, request) == "INVALID_ARGUMENT: No signature was found with the name: nosig"
    request.model_spec.signature_name = "regress"
    wanted = 'Expected classification signature outputs to contain at least one of "classes" or "scores". Signature was'
    assert failure(classify, scorer, request).startswith(f"FAILED_PRECONDITION: {wanted}")
    wide = regression_pb2.RegressionRequest(input=examples(1.0))
    assert failure(regress, scorer, wide) == "INVALID_ARGUMENT: Expected one output Tensor."
    wide.model_spec.signature_name = "wide"
    assert failure(regress, scorer, wide) == (
        "INVALID_ARGUMENT: Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got [1,2]"
    )
    wide.model_spec.signature_name = "regress"
    wide.input.example_list.examples[0].features.feature["x"].bytes_list.value.append(b"no float")
    assert failure(regress, scorer, wide).startswith("INVALID_ARGUMENT: ")  # parse_example itself


def test_the_init_op_produces_no_output(tmp_path: Path) -> None:
    model = SavedModel(recordings.DIRECTORY / "models" / "echo" / "2")
    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = "echo", "__saved_model_init_op"
    assert failure(predict, Handle("echo", 2, model), request).startswith(
        "INVALID_ARGUMENT: Tried to fetch data for 'NoOp:0', which produces no output."
    )


def test_inputs_that_have_defaults_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "1"
    shutil.copytree(recordings.DIRECTORY / "models" / "echo" / "2", path)
    saved = saved_model_pb2.SavedModel.FromString((path / "saved_model.pb").read_bytes())
    signature = saved.meta_graphs[0].signature_def["serving_default"]
    text_format.Parse(
        "dtype: DT_FLOAT tensor_shape { dim { size: 1 } dim { size: 4 } } float_val: 1", signature.defaults["state"]
    )
    (path / "saved_model.pb").write_bytes(saved.SerializeToString())
    handle = Handle("echo", 2, SavedModel(path))
    request = predict_pb2.PredictRequest()
    text_format.Parse(
        "dtype: DT_FLOAT tensor_shape { dim { size: 1 } dim { size: 8 } } float_val: 2", request.inputs["x"]
    )
    assert list(predict(handle, request).outputs["next_state"].float_val) == [17.0] * 4
    del request.inputs["x"]
    assert failure(predict, handle, request) == (
        "INVALID_ARGUMENT: Signature input alias: x(feed name: serving_default_x:0) not found in request and no "
        "default value provided. Inputs expected to be in the set {state,x}."
    )


def test_warmup_runs_the_records_and_fails_the_load_where_one_fails(tmp_path: Path) -> None:
    path = tmp_path / "1"
    shutil.copytree(recordings.DIRECTORY / "models" / "counter" / "2", path)
    (path / "assets.extra").mkdir()
    log = prediction_log_pb2.PredictionLog()
    text_format.Parse("dtype: DT_FLOAT tensor_shape {} float_val: 3", log.predict_log.request.inputs["inc"])
    file = path / "assets.extra" / "tf_serving_warmup_requests"

    def write(*records: bytes) -> None:
        with tf.io.TFRecordWriter(str(file)) as writer:
            for record in records:
                writer.write(record)

    write(log.SerializeToString(), log.SerializeToString())
    handle = Handle("counter", 2, SavedModel(path))
    warm_up(handle, path)
    assert list(predict(handle, log.predict_log.request).outputs["count"].float_val) == [9.0]  # it ran, twice
    del log.predict_log.request.inputs["inc"]
    write(log.SerializeToString())
    assert failure(warm_up, handle, path).startswith(
        "INVALID_ARGUMENT: Warmup of {name: counter version: 2} failed: input size does not match signature: 0!=1"
    )
    write(b"\xff\xff")
    assert failure(warm_up, handle, path).startswith("DATA_LOSS: Failed to parse warmup record 0")
    file.write_bytes(b"not a record file at all")
    assert failure(warm_up, handle, path).startswith("DATA_LOSS: ")
    write(*[prediction_log_pb2.PredictionLog().SerializeToString()] * 1001)
    assert "exceeds the maximum (1000)" in failure(warm_up, handle, path)


@pytest.mark.parametrize(
    ("harm", "text"),
    [
        (
            lambda path: (path / "saved_model.pb").unlink(),
            "NOT_FOUND: Could not find SavedModel .pb or .pbtxt at supplied",
        ),
        (lambda path: (path / "saved_model.pb").write_bytes(b"garbage"), "DATA_LOSS: Can't parse "),
        (lambda path: os.truncate(path / "saved_model.pb", 0), "NOT_FOUND: Could not find meta graph def matching"),
        (lambda path: shutil.rmtree(path / "variables"), "NOT_FOUND: Could not find the variables of "),
        (
            lambda path: os.truncate(path / "variables" / "variables.data-00000-of-00001", 10),
            "OUT_OF_RANGE: Read less bytes than requested",
        ),
        (lambda path: os.truncate(path / "variables" / "variables.index", 50), "DATA_LOSS: "),
    ],
)
def test_what_cannot_be_loaded(tmp_path: Path, harm: Any, text: str) -> None:
    path = tmp_path / "1"
    shutil.copytree(recordings.DIRECTORY / "models" / "echo" / "2", path)
    harm(path)
    assert failure(SavedModel, path).startswith(text)
