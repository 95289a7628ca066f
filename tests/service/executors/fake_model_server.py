"""A PredictionService that answers whatever a test tells it to, in this process."""

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from service.executors.serving_protos import get_model_status_pb2, predict_pb2
from tests.service.executors.sequence_models import description

StepAnswer = Callable[[Any, grpc.aio.ServicerContext[Any, Any]], Awaitable[bytes]]
AVAILABLE = 30


class FakeModelServer(grpc.GenericRpcHandler):
    """Serves the versions in ``fingerprints``; what ``step`` answers is the test's."""

    def __init__(self, name: str = "sums") -> None:
        self.name = name
        self.fingerprints = {1: "fake"}
        self.others: dict[int, tuple[int, str]] = {}  # versions that cannot be stepped: state and error
        self.text: bytes | None = None
        self.answer: StepAnswer | None = None
        self.steps = 0

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        if details.method.endswith("/GetModelStatus"):
            return grpc.unary_unary_rpc_method_handler(self._status)
        return grpc.unary_unary_rpc_method_handler(self._predict)

    async def _status(self, request: bytes, context: Any) -> bytes:
        asked = get_model_status_pb2.GetModelStatusRequest.FromString(request)
        if asked.model_spec.name != self.name:
            await context.abort(grpc.StatusCode.NOT_FOUND, "Could not find any versions of model")
        response = get_model_status_pb2.GetModelStatusResponse()
        for version in self.fingerprints:
            response.model_version_status.add(version=version, state=AVAILABLE)
        for version, (state, error) in self.others.items():
            response.model_version_status.add(version=version, state=state).status.error_message = error
        return response.SerializeToString()

    async def _predict(self, request: bytes, context: Any) -> bytes:
        asked = predict_pb2.PredictRequest.FromString(request)
        if asked.model_spec.signature_name == "describe":
            text = self.text
            if text is None:
                text = description(self.name, self.fingerprints[asked.model_spec.version.value]).encode()
            response = predict_pb2.PredictResponse(model_spec=asked.model_spec)
            response.outputs["config"].dtype = 7
            response.outputs["config"].string_val.append(text)
            return response.SerializeToString()
        self.steps += 1
        assert self.answer is not None
        return await self.answer(asked, context)


def reply(request: Any, **outputs: Any) -> Any:
    """A PredictResponse with typed fields."""
    response = predict_pb2.PredictResponse(model_spec=request.model_spec)
    for name, array in outputs.items():
        tensor = response.outputs[name]
        tensor.dtype = 1
        for size in array.shape:
            tensor.tensor_shape.dim.add(size=size)
        tensor.float_val.extend(array.ravel().tolist())
    return response


@contextlib.asynccontextmanager
async def running(handler: FakeModelServer, port: int = 0) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(None)
