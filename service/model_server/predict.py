"""Predict: a signature's inputs into the graph, its outputs out of it. Checks and messages as in predict_util.cc."""

from collections.abc import Collection, Mapping
from typing import Any

from tensorflow_serving.apis import predict_pb2

from service.model_server.errors import ServingError, failed_precondition, invalid_argument
from service.model_server.manager import Handle
from service.model_server.saved_model import SavedModel
from service.model_server.tensors import Array, TensorError, from_proto, to_proto

DEFAULT_SIGNATURE = "serving_default"


def predict(handle: Handle[SavedModel], request: Any, *, timeout_ms: int = 0, as_content: bool = False) -> Any:
    """Runs a ``PredictRequest`` on a version.

    Args:
        handle: The version that the request's model_spec asks for.
        request: The request.
        timeout_ms: Time limit of the run; 0 for none.
        as_content: Answer with ``tensor_content`` instead of typed fields.

    Raises:
        ServingError: it does not fit the signature, or the graph failed.
    """
    name = request.model_spec.signature_name or DEFAULT_SIGNATURE
    signature = handle.servable.signature(name)
    if signature is None:
        raise failed_precondition(f'Serving signature key "{name}" not found.')
    feeds = _feeds(signature, request.inputs)
    aliases = _outputs(signature, request.output_filter)
    fetches = [signature.outputs[alias].name for alias in aliases]
    results = handle.servable.run(feeds, fetches, timeout_ms)
    response = predict_pb2.PredictResponse()
    response.model_spec.name = handle.name
    response.model_spec.version.value = handle.version
    response.model_spec.signature_name = name
    for alias, (array, dtype) in zip(aliases, results, strict=True):
        try:
            to_proto(array, dtype, response.outputs[alias], as_content=as_content)
        except TensorError as error:
            raise failed_precondition(f"output {alias}: {error}") from error
    return response


def parse_tensor(alias: str, proto: Any) -> Array:
    """One input.

    Raises:
        ServingError: the proto does not describe a tensor.
    """
    try:
        return from_proto(proto)
    except TensorError as error:
        raise invalid_argument(f"tensor parsing error: {alias}") from error


def _feeds(signature: Any, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """The inputs by tensor name. Their dtypes and shapes are the graph's affair."""
    if signature.defaults:
        return _feeds_with_defaults(signature, inputs)
    if len(inputs) != len(signature.inputs):
        raise _size_mismatch(signature, inputs)
    feeds = {}
    for alias in inputs:
        if alias not in signature.inputs:
            raise invalid_argument(
                f"input tensor alias not found in signature: {alias}. "
                f"Inputs expected to be in the set {_set(signature.inputs)}."
            )
        feeds[signature.inputs[alias].name] = parse_tensor(alias, inputs[alias])
    return feeds


def _feeds_with_defaults(signature: Any, inputs: Mapping[str, Any]) -> dict[str, Array]:
    """As ``_feeds``, for a signature that has values for inputs that may be left out (TensorFlow 2.16 and later)."""
    if len(inputs) > len(signature.inputs):
        raise _size_mismatch(signature, inputs)
    feeds = {}
    for alias, info in signature.inputs.items():
        proto = inputs[alias] if alias in inputs else signature.defaults.get(alias)
        if proto is None:
            raise invalid_argument(
                f"Signature input alias: {alias}(feed name: {info.name}) not found in request and no default value "
                f"provided. Inputs expected to be in the set {_set(signature.inputs)}."
            )
        feeds[info.name] = parse_tensor(alias, proto)
    return feeds


def _outputs(signature: Any, output_filter: Collection[str]) -> list[str]:
    """The aliases to fetch: those asked for, all where none is."""
    seen = set()
    for alias in output_filter:
        if alias not in signature.outputs:
            raise invalid_argument(
                f"output tensor alias not found in signature: {alias} "
                f"Outputs expected to be in the set {_set(signature.outputs)}."
            )
        if alias in seen:
            raise invalid_argument(f"duplicate output tensor alias: {alias}")
        seen.add(alias)
    return list(output_filter) or list(signature.outputs)


def _size_mismatch(signature: Any, inputs: Mapping[str, Any]) -> ServingError:
    sent, expected = set(inputs), set(signature.inputs)
    return invalid_argument(
        f"input size does not match signature: {len(sent)}!={len(expected)} len({_set(sent)}) != "
        f"len({_set(expected)}). Sent extra: {_set(sent - expected)}. "
        f"Missing but required: {_set(expected - sent)}."
    )


def _set(names: Collection[str]) -> str:
    return "{" + ",".join(sorted(names)) + "}"
