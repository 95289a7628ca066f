"""Around every call: who calls, errors become statuses, and each call leaves a line in the log."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import grpc
from grpc_status import rpc_status

from service.bounds import MAX_MESSAGE_STEPS, bounded, check_bounds
from service.errors import ServiceError
from service.forms import Form
from service.identity import ANONYMOUS, Principal, set_caller
from service.logs import RequestLog
from service.observing import Observer, reason_of
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
        observer: Hears of every call.
        requests: Gets a line for each.
        max_message_bytes: The largest request.
        forms: Of some methods, by their full names, in the place of what they come with.
    """

    def __init__(
        self,
        authenticator: Authenticator,
        observer: Observer,
        requests: RequestLog,
        max_message_bytes: int,
        forms: Mapping[str, Form] = MappingProxyType({}),
    ) -> None:
        self._authenticator = authenticator
        self._observer = observer
        self._requests = requests
        self._max_bytes = max_message_bytes
        self._forms = forms

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
        form = self._forms.get(method) or Form(handler.request_deserializer, handler.response_serializer)
        parse, serialize = form.parse, form.serialize
        if parse is not None:
            parse = bounded(parse, MAX_MESSAGE_STEPS, self._max_bytes)
        if handler.unary_unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(method, handler.unary_unary), parse, serialize)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(self._stream(method, handler.stream_stream), parse, serialize)
        return handler

    def _unary(self, method: str, behavior: Callable[..., Any]) -> Callable[[Any, _Context], Awaitable[Any]]:
        async def answer(request: Any, context: _Context) -> Any:
            with _Call(self._observer, self._requests, method, getattr(request, "session_id", "")) as call:
                try:
                    call.caller = self._identify(context).name
                    check_bounds(request)
                    response = await behavior(request, context)
                except Exception as error:  # noqa: BLE001 - whatever it is, the table has a status for it
                    call.fail(error, context)
                    return None
                call.code = "OK"
                return response

        return answer

    def _stream(self, method: str, behavior: Callable[..., Any]) -> Callable[[Any, _Context], AsyncIterator[Any]]:
        async def answer(requests: Any, context: _Context) -> AsyncIterator[Any]:
            with _Call(self._observer, self._requests, method, stream=True) as call:
                try:
                    call.caller = self._identify(context).name
                    async for response in behavior(requests, context):
                        yield response
                except Exception as error:  # noqa: BLE001 - as above
                    call.fail(error, context)
                    return
                call.code = "OK"

        return answer

    def _identify(self, context: _Context) -> Principal:
        metadata = context.invocation_metadata() or ()
        authorization = next((str(value) for key, value in metadata if key == "authorization"), None)
        certificate = next(iter(context.auth_context().get("x509_common_name", ())), None)
        caller = self._authenticator.caller(authorization, certificate.decode() if certificate else None)
        principal = caller()
        set_caller(caller, context.peer() if principal is ANONYMOUS else "")
        return principal


class _Call:
    """One call or stream from its beginning to its end: counted and logged, however it ends."""

    def __init__(
        self, observer: Observer, requests: RequestLog, method: str, session_id: str = "", *, stream: bool = False
    ) -> None:
        self._observer = observer
        self._requests = requests
        self._method = method
        self._rpc = method.rpartition("/")[2]
        self._session_id = session_id
        self._stream = stream
        self._began = 0.0
        self._reason = ""
        self.caller = ""
        self.code = ""  # until there is another, it was cancelled

    def fail(self, error: Exception, context: _Context) -> None:
        """Has the call end with the status of an error once its handler returns; what that returns is not sent.

        Not ``context.abort``: what that raises, gRPC keeps, in a cycle of references with the frames that it passed,
        and all that these hold of a call waits for the garbage collector.
        """
        if isinstance(error, grpc.aio.AbortError):  # the handler has already answered
            self.code = context.code().name if isinstance(context.code(), grpc.StatusCode) else "UNKNOWN"
            raise error
        self._observer.failed(error)
        self._reason = reason_of(error)
        if not isinstance(error, ServiceError):
            _log.error("%s failed", self._method, exc_info=error)
        status = rpc_status.to_status(status_of(error))
        self.code = status.code.name
        context.set_code(status.code)
        context.set_details(status.details)
        context.set_trailing_metadata(status.trailing_metadata)

    def __enter__(self) -> Self:
        self._began = time.perf_counter()
        if self._stream:
            self._observer.stream_opened(self._rpc)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        seconds = time.perf_counter() - self._began
        if not self.code:
            self.code = self._reason = "CANCELLED"
            if not self._stream:  # of a stream, the steps that it cancelled are counted
                self._observer.failed(asyncio.CancelledError())
        self._observer.call_ended(self._rpc, self.code, seconds)
        if self._requests.wanted():
            self._requests.write(
                self._rpc,
                code=self.code,
                seconds=seconds,
                session_id=self._session_id,
                reason=self._reason,
                caller=self.caller,
            )
