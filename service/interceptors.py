"""Around every call: errors become statuses, and each call leaves a line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc
from grpc_status import rpc_status

from service.errors import ServiceError
from service.status import status_of

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in their stubs alone
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]


class ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Turns a handler's exception into its status by the table of ``status.py``.

    A ``ServiceError`` is an answer. Anything else that is raised is a bug: it is logged with its traceback, and the
    client sees INTERNAL without its text.
    """

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _Handler | None:
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        if handler is None:  # no such method: gRPC answers UNIMPLEMENTED
            return handler
        method = handler_call_details.method
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                _unary(method, handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                _stream(method, handler.stream_stream), handler.request_deserializer, handler.response_serializer
            )
        return handler


def _unary(method: str, behavior: Callable[..., Any]) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def call(request: Any, context: _Context) -> Any:
        started = time.perf_counter()
        try:
            response = await behavior(request, context)
        except Exception as error:  # noqa: BLE001 - whatever it is, the table has a status for it
            await _abort(method, error, context)
        _log.debug("%s ok in %.2f ms", method, 1e3 * (time.perf_counter() - started))
        return response

    return call


def _stream(method: str, behavior: Callable[..., Any]) -> Callable[[Any, _Context], AsyncIterator[Any]]:
    async def call(requests: Any, context: _Context) -> AsyncIterator[Any]:
        try:
            async for response in behavior(requests, context):
                yield response
        except Exception as error:  # noqa: BLE001 - as above
            await _abort(method, error, context)

    return call


async def _abort(method: str, error: Exception, context: _Context) -> None:
    if isinstance(error, grpc.aio.AbortError):  # the handler has already answered
        raise error
    if isinstance(error, ServiceError):
        _log.debug("%s refused: %s: %s", method, error.reason, error.message)
    else:
        _log.error("%s failed", method, exc_info=error)
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
