"""Around every call: who calls, errors become statuses, and each call leaves a line in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_status import rpc_status

from service.errors import ServiceError
from service.identity import Principal, set_caller
from service.status import status_of

_log = logging.getLogger(__name__)

if TYPE_CHECKING:  # generic in their stubs alone
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]


# What says whether a gateway is alive must not depend on credentials.
_OPEN = "/grpc.health.v1.Health/"


class Authenticator(Protocol):
    """Tells who calls."""

    def caller(self, authorization: str | None, certificate: str | None) -> Callable[[], Principal]:
        """Who these credentials stand for; see ``auth.TokenFile.caller``."""
        ...

    def reload(self) -> None:
        """Looks whether what it knows has changed."""
        ...


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Finds out who calls, and turns a handler's exception into its status by the table of ``status.py``.

    A ``ServiceError`` is an answer. Anything else that is raised is a bug: it is logged with its traceback, and the
    client sees INTERNAL without its text.

    Args:
        authenticator: Tells who calls.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

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
        if method.startswith(_OPEN):
            return handler
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(
                self._unary(method, handler.unary_unary), handler.request_deserializer, handler.response_serializer
            )
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(
                self._stream(method, handler.stream_stream), handler.request_deserializer, handler.response_serializer
            )
        return handler

    def _unary(self, method: str, behavior: Callable[..., Any]) -> Callable[[Any, _Context], Awaitable[Any]]:
        async def call(request: Any, context: _Context) -> Any:
            started = time.perf_counter()
            try:
                self._identify(context)
                response = await behavior(request, context)
            except Exception as error:  # noqa: BLE001 - whatever it is, the table has a status for it
                await _abort(method, error, context)
            _log.debug("%s ok in %.2f ms", method, 1e3 * (time.perf_counter() - started))
            return response

        return call

    def _stream(self, method: str, behavior: Callable[..., Any]) -> Callable[[Any, _Context], AsyncIterator[Any]]:
        async def call(requests: Any, context: _Context) -> AsyncIterator[Any]:
            try:
                self._identify(context)
                async for response in behavior(requests, context):
                    yield response
            except Exception as error:  # noqa: BLE001 - as above
                await _abort(method, error, context)

        return call

    def _identify(self, context: _Context) -> None:
        metadata = context.invocation_metadata() or ()
        authorization = next((str(value) for key, value in metadata if key == "authorization"), None)
        certificate = next(iter(context.auth_context().get("x509_common_name", ())), None)
        caller = self._authenticator.caller(authorization, certificate.decode() if certificate else None)
        caller()
        set_caller(caller)


async def _abort(method: str, error: Exception, context: _Context) -> None:
    if isinstance(error, grpc.aio.AbortError):  # the handler has already answered
        raise error
    if isinstance(error, ServiceError):
        _log.debug("%s refused: %s: %s", method, error.reason, error.message)
    else:
        _log.error("%s failed", method, exc_info=error)
    status = rpc_status.to_status(status_of(error))
    await context.abort(status.code, status.details, status.trailing_metadata)
