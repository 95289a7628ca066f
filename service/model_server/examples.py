"""Classify, Regress and MultiInference: signatures that take serialized ``tf.Example`` protos.

Checks and messages as in TensorFlow Serving's classifier.cc, regressor.cc and multi_inference.cc, with the check of
method names off, as its server has it by default: any signature with the right inputs and outputs will do.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import grpc
import numpy as np
from tensorflow.core.framework import types_pb2
from tensorflow_serving.apis import classification_pb2, inference_pb2, regression_pb2

from service.model_server.errors import ServingError, failed_precondition, invalid_argument
from service.model_server.manager import Handle
from service.model_server.predict import DEFAULT_SIGNATURE
from service.model_server.saved_model import SavedModel
from service.model_server.tensors import Array

_CLASSIFY_METHOD = "tensorflow/serving/classify"
_REGRESS_METHOD = "tensorflow/serving/regress"
_INPUTS = "inputs"
_CLASSES, _SCORES = "classes", "scores"
_OUTPUTS = "outputs"


class _Plan(NamedTuple):
    """What a signature needs run: the tensor that takes the examples, and the tensors to fetch, by role."""

    input_name: str
    fetches: dict[str, str]


def classify(handle: Handle[SavedModel], request: Any, *, timeout_ms: int = 0) -> Any:
    """Runs a ``ClassificationRequest``.

    Raises:
        ServingError: the signature or the input does not fit, or the graph failed.
    """
    plan = _plan_classification(_signature(handle, request.model_spec))
    results, count = _run(handle, request.input, plan.input_name, plan.fetches.values(), timeout_ms)
    response = classification_pb2.ClassificationResponse()
    _render_classification(plan, results, count, response.result)
    _render_spec(handle, request.model_spec, response.model_spec)
    return response


def regress(handle: Handle[SavedModel], request: Any, *, timeout_ms: int = 0) -> Any:
    """Runs a ``RegressionRequest``.

    Raises:
        ServingError: the signature or the input does not fit, or the graph failed.
    """
    plan = _plan_regression(_signature(handle, request.model_spec))
    results, count = _run(handle, request.input, plan.input_name, plan.fetches.values(), timeout_ms)
    response = regression_pb2.RegressionResponse()
    _render_regression(plan, results, count, response.result)
    _render_spec(handle, request.model_spec, response.model_spec)
    return response


def multi_inference(handle: Handle[SavedModel], request: Any, *, timeout_ms: int = 0) -> Any:
    """Runs a ``MultiInferenceRequest``: several signatures of one model over the same examples, in one go.

    Raises:
        ServingError: the signatures or the input do not fit, or the graph failed.
    """
    plans = _plan_tasks(handle, request.tasks)
    names = sorted({name for plan in plans for name in plan.fetches.values()})
    input_name = plans[0].input_name if plans else ""
    results, count = _run(handle, request.input, input_name, names, timeout_ms)
    response = inference_pb2.MultiInferenceResponse()
    for task, plan in zip(request.tasks, plans, strict=True):
        result = response.results.add()
        if task.method_name == _CLASSIFY_METHOD:
            _render_classification(plan, results, count, result.classification_result)
        else:
            _render_regression(plan, results, count, result.regression_result)
        _render_spec(handle, task.model_spec, result.model_spec)
    return response


def _signature(handle: Handle[SavedModel], model_spec: Any) -> Any:
    name = model_spec.signature_name or DEFAULT_SIGNATURE
    signature = handle.servable.signature(name)
    if signature is None:
        raise invalid_argument(f"No signature was found with the name: {name}")
    return signature


def _plan_classification(signature: Any) -> _Plan:
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if len(signature.outputs) not in {1, 2}:
        raise invalid_argument(f"Expected one or two output Tensors, found {len(signature.outputs)}")
    if _INPUTS not in signature.inputs:
        raise failed_precondition(f"No classification inputs found in SignatureDef: {signature}")
    fetches = {role: signature.outputs[role].name for role in (_CLASSES, _SCORES) if role in signature.outputs}
    if not fetches:
        raise failed_precondition(
            f'Expected classification signature outputs to contain at least one of "{_CLASSES}" or "{_SCORES}". '
            f"Signature was: {signature}"
        )
    return _Plan(signature.inputs[_INPUTS].name, fetches)


def _plan_regression(signature: Any) -> _Plan:
    if len(signature.inputs) != 1:
        raise invalid_argument("Expected one input Tensor.")
    if len(signature.outputs) != 1:
        raise invalid_argument("Expected one output Tensor.")
    if _INPUTS not in signature.inputs:
        raise failed_precondition(f"No regression inputs found in SignatureDef: {signature}")
    if _OUTPUTS not in signature.outputs:
        raise failed_precondition(f"No regression outputs found in SignatureDef: {signature}")
    return _Plan(signature.inputs[_INPUTS].name, {_OUTPUTS: signature.outputs[_OUTPUTS].name})


def _plan_tasks(handle: Handle[SavedModel], tasks: Iterable[Any]) -> list[_Plan]:
    plans: list[_Plan] = []
    seen = set()
    for task in tasks:
        if not task.model_spec.name:
            raise invalid_argument("Found ModelSpec with an empty model name.")
        if task.model_spec.name != handle.name:
            raise invalid_argument("All ModelSpecs in a MultiInferenceRequest must access the same model name.")
        name = task.model_spec.signature_name or DEFAULT_SIGNATURE
        if name in seen:
            raise invalid_argument(f"Duplicate evaluation of signature: {name}")
        seen.add(name)
        signature = handle.servable.signature(name)
        if signature is None:
            raise invalid_argument(f"Requested signature not found in model graph: {name}")
        if task.method_name == _CLASSIFY_METHOD:
            plan = _plan_classification(signature)
        elif task.method_name == _REGRESS_METHOD:
            plan = _plan_regression(signature)
        else:
            raise ServingError(grpc.StatusCode.UNIMPLEMENTED, f"Unsupported signature method_name: {task.method_name}")
        if plans and plan.input_name != plans[0].input_name:
            raise invalid_argument("Input tensor must be the same for all Signatures.")
        plans.append(plan)
    return plans


def _run(
    handle: Handle[SavedModel], request_input: Any, input_name: str, names: Iterable[str], timeout_ms: int
) -> tuple[dict[str, tuple[Array, int]], int]:
    """Feeds the serialized examples; returns what was fetched, by tensor name, and how many examples there were."""
    examples = _serialized_examples(request_input)
    fetches = list(dict.fromkeys(names))
    results = handle.servable.run({input_name: examples}, fetches, timeout_ms)
    return dict(zip(fetches, results, strict=True)), len(examples)


def _serialized_examples(request_input: Any) -> Array:
    """``[examples]`` of bytes. A context is put before each example: protos merge when they are joined."""
    kind = request_input.WhichOneof("kind")
    serialized: list[bytes] = []
    if kind == "example_list":
        serialized = [example.SerializeToString() for example in request_input.example_list.examples]
    elif kind == "example_list_with_context":
        listed = request_input.example_list_with_context
        context = listed.context.SerializeToString()
        serialized = [context + example.SerializeToString() for example in listed.examples]
    if not serialized:
        raise invalid_argument("Input is empty.")
    array = np.empty(len(serialized), object)
    array[:] = serialized
    return array


def _render_classification(plan: _Plan, results: Mapping[str, tuple[Array, int]], count: int, result: Any) -> None:
    found: dict[str, Array] = {}
    for role, expected in ((_CLASSES, types_pb2.DT_STRING), (_SCORES, types_pb2.DT_FLOAT)):
        if role not in plan.fetches:
            continue
        array, dtype = results[plan.fetches[role]]
        if array.ndim != 2:
            raise invalid_argument(f"Expected Tensor shape: [batch_size num_classes] but got {_shape(array)}")
        if dtype != expected:
            raise invalid_argument(f"Expected {role} Tensor of {_name(expected)}. Got: {_name(dtype)}")
        if array.shape[0] != count:
            raise invalid_argument(f"Expected {role} output batch size of {count}. Got: {array.shape[0]}")
        found[role] = array
    classes, scores = found.get(_CLASSES), found.get(_SCORES)
    if classes is not None and scores is not None and classes.shape[1] != scores.shape[1]:
        raise invalid_argument(
            f"Tensors class and score should match in dim_size(1). Got {classes.shape[1]} vs. {scores.shape[1]}"
        )
    for row in range(count):
        classifications = result.classifications.add()
        for column in range(next(iter(found.values())).shape[1]):
            entry = classifications.classes.add()
            if classes is not None:
                entry.label = classes[row, column].decode()
            if scores is not None:
                entry.score = scores[row, column]


def _render_regression(plan: _Plan, results: Mapping[str, tuple[Array, int]], count: int, result: Any) -> None:
    array, dtype = results[plan.fetches[_OUTPUTS]]
    if not (array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1)):
        raise invalid_argument(
            f"Expected output Tensor shape to be either [batch_size] or [batch_size, 1] but got {_shape(array)}"
        )
    if array.shape[0] != count:
        raise invalid_argument(f"Input batch size did not match output batch size: {count} vs. {array.shape[0]}")
    if dtype != types_pb2.DT_FLOAT:
        raise invalid_argument(f"Expected output Tensor of DT_FLOAT.  Got: {_name(dtype)}")
    for value in array.ravel():
        result.regressions.add(value=value)


def _render_spec(handle: Handle[SavedModel], asked: Any, model_spec: Any) -> None:
    model_spec.name = handle.name
    model_spec.version.value = handle.version
    model_spec.signature_name = asked.signature_name or DEFAULT_SIGNATURE


def _shape(array: Array) -> str:
    return "[" + ",".join(str(size) for size in array.shape) + "]"


def _name(dtype: int) -> str:
    return str(types_pb2.DataType.Name(dtype))
