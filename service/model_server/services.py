"""The gRPC methods: bytes in, bytes out; what goes wrong becomes a status.

Requests are parsed here and not by gRPC, since TensorFlow Serving answers garbage, and methods that it does not know,
with an empty message where gRPC for Python has a text of its own.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    predict_pb2,
    regression_pb2,
)

from service.model_server import examples
from service.model_server.core import ServerCore
from service.model_server.errors import ServingError, invalid_argument, not_found
from service.model_server.predict import predict

_log = logging.getLogger(__name__)
_SIGNATURE_DEF = "signature_def"

Context = grpc.aio.ServicerContext[Any, Any]
Call = Callable[[Any, int], Any]


class _Method(NamedTuple):
    request_type: Any
    call: Call
    """Takes the parsed request and the time limit in ms (0: none); returns the response message."""


class ServingHandlers(grpc.GenericRpcHandler):
    """Every method of PredictionService and ModelService; UNIMPLEMENTED for the rest.

    Args:
        core: What is configured and loaded.
        max_threads: As TensorFlow Serving's ``--grpc_max_threads``: one less than this many calls run at once.
        as_content: Answer Predict with ``tensor_content`` instead of typed fields.
        allow_reload: Whether HandleReloadConfigRequest is taken.
    """

    def __init__(
        self, core: ServerCore, *, max_threads: int, as_content: bool = False, allow_reload: bool = False
    ) -> None:
        self._core = core
        self._as_content = as_content
        self._allow_reload = allow_reload
        self._free_threads = max_threads - 1
        self._threads = concurrent.futures.ThreadPoolExecutor(max_threads - 1, thread_name_prefix="rpc")
        # One at a time, in the order they came, each for as long as it takes: a reload may wait for ever.
        self._reloads = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="reload")
        prediction, model = "/tensorflow.serving.PredictionService/", "/tensorflow.serving.ModelService/"
        self._methods: dict[str, _Method] = {
            prediction + "Predict": _Method(predict_pb2.PredictRequest, self._predict),
            prediction + "GetModelMetadata": _Method(get_model_metadata_pb2.GetModelMetadataRequest, self._metadata),
            prediction + "Classify": _Method(classification_pb2.ClassificationRequest, self._classify),
            prediction + "Regress": _Method(regression_pb2.RegressionRequest, self._regress),
            prediction + "MultiInference": _Method(inference_pb2.MultiInferenceRequest, self._multi_inference),
            model + "GetModelStatus": _Method(get_model_status_pb2.GetModelStatusRequest, self._status),
        }
        self._reload_method = model + "HandleReloadConfigRequest"

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any]":
        """The handler of a method; there is always one."""
        if handler_call_details.method == self._reload_method:
            return grpc.unary_unary_rpc_method_handler(self._handle_reload)
        method = self._methods.get(handler_call_details.method)
        if method is None:
            return grpc.stream_stream_rpc_method_handler(_unimplemented)
        return grpc.unary_unary_rpc_method_handler(self._handler(method))

    def close(self) -> None:
        """Lets the threads end; a reload that waits must have been told to give up."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._reloads.shutdown(wait=False, cancel_futures=True)

    def _handler(self, method: _Method) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def handle(request: bytes, context: Context) -> bytes:
            if not self._free_threads:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
            remaining = context.time_remaining()
            timeout_ms = 0 if remaining is None else max(int(remaining * 1000), 0)
            self._free_threads -= 1
            future = asyncio.get_running_loop().run_in_executor(self._threads, _answer, method, request, timeout_ms)
            # The thread is taken until it is done, even where the client has gone away.
            future.add_done_callback(self._release)
            return await _finish(asyncio.shield(future), context)

        return handle

    def _release(self, future: "asyncio.Future[bytes]") -> None:
        self._free_threads += 1
        if not future.cancelled():
            future.exception()  # looked at, so that one whose client has gone is not reported as forgotten

    async def _handle_reload(self, request: bytes, context: Context) -> bytes:
        if not self._allow_reload:
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, "reloading is off: start the server with --allow-reload"
            )
        method = _Method(model_management_pb2.ReloadConfigRequest, self._reload)
        future = asyncio.get_running_loop().run_in_executor(self._reloads, _answer, method, request, 0)
        future.add_done_callback(lambda done: None if done.cancelled() else done.exception() and None)
        return await _finish(asyncio.shield(future), context)

    def _predict(self, request: Any, timeout_ms: int) -> Any:
        with self._core.use(_spec(request)) as handle:
            return predict(handle, request, timeout_ms=timeout_ms, as_content=self._as_content)

    def _classify(self, request: Any, timeout_ms: int) -> Any:
        with self._core.use(_spec(request)) as handle:
            return examples.classify(handle, request, timeout_ms=timeout_ms)

    def _regress(self, request: Any, timeout_ms: int) -> Any:
        with self._core.use(_spec(request)) as handle:
            return examples.regress(handle, request, timeout_ms=timeout_ms)

    def _multi_inference(self, request: Any, timeout_ms: int) -> Any:
        task = request.tasks[0] if request.tasks else inference_pb2.InferenceTask()
        with self._core.use(task.model_spec) as handle:
            return examples.multi_inference(handle, request, timeout_ms=timeout_ms)

    def _metadata(self, request: Any, timeout_ms: int) -> Any:
        del timeout_ms
        spec = _spec(request)
        if not request.metadata_field:
            raise invalid_argument("GetModelMetadataRequest must specify at least one metadata_field")
        for field in request.metadata_field:
            if field != _SIGNATURE_DEF:
                raise invalid_argument(f"Metadata field {field} is not supported")
        response = get_model_metadata_pb2.GetModelMetadataResponse()
        with self._core.use(spec) as handle:
            signatures = get_model_metadata_pb2.SignatureDefMap(signature_def=handle.servable.signatures)
            response.model_spec.name = handle.name
            response.model_spec.version.value = handle.version
        response.metadata[_SIGNATURE_DEF].Pack(signatures)
        return response

    def _status(self, request: Any, timeout_ms: int) -> Any:
        del timeout_ms
        spec = _spec(request)
        states = self._core.monitor.versions(spec.name)
        if spec.WhichOneof("version_choice") == "version":
            wanted = spec.version.value
            if wanted not in states:
                raise not_found(f"Could not find version {wanted} of model {spec.name}")
            states = {wanted: states[wanted]}
        if not states:
            raise not_found(f"Could not find any versions of model {spec.name}")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version, state in states.items():
            status = response.model_version_status.add(version=version, state=int(state.state))
            status.status.SetInParent()
            if state.error is not None:
                status.status.error_code = state.error.code.value[0]
                status.status.error_message = state.error.message
        return response

    def _reload(self, request: Any, timeout_ms: int) -> Any:
        del timeout_ms
        self._core.reload(request.config)
        response = model_management_pb2.ReloadConfigResponse()
        response.status.SetInParent()
        return response


def _spec(request: Any) -> Any:
    if not request.HasField("model_spec"):
        raise invalid_argument("Missing ModelSpec")
    return request.model_spec


def _answer(method: _Method, request: bytes, timeout_ms: int) -> bytes:
    """Parses, runs and serializes, off the event loop."""
    try:
        message = method.request_type.FromString(request)
    except DecodeError:
        raise ServingError(grpc.StatusCode.INTERNAL, "") from None
    return bytes(method.call(message, timeout_ms).SerializeToString())


async def _finish(future: "asyncio.Future[bytes]", context: Context) -> bytes:
    try:
        return await future
    except ServingError as error:
        await context.abort(error.code, error.details)
    except Exception:  # noqa: BLE001 - whatever it is, the client gets an answer
        _log.exception("request failed")
        await context.abort(grpc.StatusCode.UNKNOWN, "")
    raise AssertionError("abort() raises")


async def _unimplemented(requests: Any, context: Context) -> None:
    del requests
    await context.abort(grpc.StatusCode.UNIMPLEMENTED, "")
