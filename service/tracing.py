"""OpenTelemetry traces of the gateway, for those who ask for them: ``--tracing``. Nothing else imports OpenTelemetry.

What is traced is wrapped here, once, when the gateway is put together; without tracing nothing is wrapped and nothing
costs. Spans say which model, how many sessions and how long: never which session, inputs, outputs, a token or an
error's text.

A step runs in a batch with others. The batch's span is a child of the first of its steps, with links to the others;
each of these gets a span of its own for the same time, with a link to the batch, so that every trace is whole.
"""

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Thread
from typing import TYPE_CHECKING, Any, Protocol, cast

import grpc
from opentelemetry import context as otel_context
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.trace import Link, NonRecordingSpan, Span, SpanContext, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.errors import ServiceError
from service.executors import Executor
from service.observing import reason_of
from service.sessions import SessionStore
from service.types import StepBatch, StepBatchResult, VersionKey

if TYPE_CHECKING:  # generic in their stubs alone
    _Context = grpc.aio.ServicerContext[Any, Any]
    _Handler = grpc.RpcMethodHandler[Any, Any]

_OURS = "/ntm_serving."
_W3C = TraceContextTextMapPropagator()
# The span of the stream that a step came in: long, and no parent for what comes in it.
_STREAM = otel_context.create_key("ntm-stream")
_STORE_METHODS = ("create", "load", "extend", "commit", "delete", "list_sessions")


class Shutdown(Protocol):
    """A tracer provider that can be ended: what it holds is sent first."""

    def shutdown(self) -> None:
        """Sends what is held, and ends."""
        ...


class Tracing:
    """Makes the gateway's spans.

    Args:
        provider: Makes tracers; see ``provider_from_environment``.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("ntm-serving")

    def interceptor(self) -> grpc.aio.ServerInterceptor:
        """Gives each call a span, a child of the one that its metadata tell of."""
        return _CallTracer(self._tracer)

    def store(self, store: SessionStore, *, remote: bool) -> SessionStore:
        """The store, its operations traced; ``remote`` says that it is another process."""
        kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL
        return cast("SessionStore", _TracedStore(store, self._tracer, kind))

    def executor(self, executor: Executor, *, remote: bool) -> Executor:
        """The executor, its batches traced; ``remote`` says that it is another process."""
        kind = SpanKind.CLIENT if remote else SpanKind.INTERNAL
        return cast("Executor", _TracedExecutor(executor, self._tracer, kind))

    @contextmanager
    def step(self, traceparent: str) -> Iterator[None]:
        """One step: of the trace that it names itself, or else of its call; where it came in a stream, a new one."""
        parent = _W3C.extract({"traceparent": traceparent}, Context()) if traceparent else None
        around = [trace.get_current_span().get_span_context(), otel_context.get_value(_STREAM)]
        links = [Link(span) for span in around if isinstance(span, SpanContext) and span.is_valid]
        if parent is None and trace.get_current_span().get_span_context().is_valid:
            links = []  # it is the parent
        with _span(self._tracer, "step", context=parent, links=links):
            yield

    def origin(self) -> SpanContext | None:
        """What a chunk's span hangs on; None where its trace is not kept."""
        span = trace.get_current_span().get_span_context()
        return span if span.is_valid and span.trace_flags.sampled else None

    def close(self, limit: float) -> None:
        """Sends what is held, and ends; where nobody takes it, what is held after ``limit`` seconds is lost."""
        if hasattr(self._provider, "shutdown"):
            # The SDK tries for longer, and cannot be told not to.
            ending = Thread(target=cast("Shutdown", self._provider).shutdown, name="end of traces", daemon=True)
            ending.start()
            ending.join(limit)


def provider_from_environment() -> TracerProvider:
    """The SDK's provider, set up by the standard ``OTEL_...`` environment: exporter, sampler, resource.

    The service is called ``ntm-gateway`` unless the environment has a name for it.

    Raises:
        ImportError: the extra ``tracing`` is not installed.
    """
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider as SdkTracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    named = os.environ.get("OTEL_SERVICE_NAME") or f"{SERVICE_NAME}=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    provider = SdkTracerProvider(resource=Resource.create({} if named else {SERVICE_NAME: "ntm-gateway"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class _CallTracer(grpc.aio.ServerInterceptor):
    """Spans of calls and streams."""

    def __init__(self, tracer: trace.Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable["_Handler | None"]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> "_Handler | None":
        """Wraps the method's handler."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
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

    def _unary(self, method: str, behavior: Callable[..., Any]) -> Callable[[Any, "_Context"], Awaitable[Any]]:
        async def answer(request: Any, context: "_Context") -> Any:
            with (
                self._call(method, context) as span,
                trace.use_span(span, record_exception=False, set_status_on_exception=False),
            ):
                return await behavior(request, context)

        return answer

    def _stream(self, method: str, behavior: Callable[..., Any]) -> Callable[[Any, "_Context"], AsyncIterator[Any]]:
        async def answer(requests: Any, context: "_Context") -> AsyncIterator[Any]:
            with self._call(method, context) as span:
                # For the rest of this task, which is the stream's own: a generator cannot put back what it found.
                otel_context.attach(otel_context.set_value(_STREAM, span.get_span_context()))
                async for response in behavior(requests, context):
                    yield response

        return answer

    @contextmanager
    def _call(self, method: str, context: "_Context") -> Iterator[Span]:
        metadata = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        service, _, name = method[1:].partition("/")
        span = self._tracer.start_span(
            method[1:],
            context=propagate.extract(metadata, Context()),
            kind=SpanKind.SERVER,
            attributes={"rpc.system": "grpc", "rpc.service": service, "rpc.method": name},
        )
        code: Any = grpc.StatusCode.OK
        try:
            yield span
            told: Any = context.code()  # None where nobody has set it
            code = told or code
        except grpc.aio.AbortError:
            code = context.code()
            raise
        except BaseException:  # cancelled, or the generator was closed
            code = grpc.StatusCode.CANCELLED
            raise
        finally:
            number = code.value[0] if isinstance(code, grpc.StatusCode) else int(code)
            span.set_attribute("rpc.grpc.status_code", number)
            if number not in (0, grpc.StatusCode.CANCELLED.value[0]):  # a client may leave as it likes
                span.set_status(Status(StatusCode.ERROR))
            span.end()


class _TracedStore:
    """A store whose operations have spans, where they belong to a trace; all else is the store's own."""

    def __init__(self, store: SessionStore, tracer: trace.Tracer, kind: SpanKind) -> None:
        self._store = store
        for name in _STORE_METHODS:
            setattr(self, name, _traced(tracer, f"store {name}", kind, getattr(store, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


class _TracedExecutor:
    """An executor whose batches have spans; all else is the executor's own."""

    def __init__(self, executor: Executor, tracer: trace.Tracer, kind: SpanKind) -> None:
        self._executor = executor
        self._tracer = tracer
        self._kind = kind

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)

    async def step(self, key: VersionKey, batch: StepBatch) -> StepBatchResult:
        """See ``Executor.step``."""
        origins = [origin for origin in batch.origins if isinstance(origin, SpanContext)]
        if not origins:
            return await self._executor.step(key, batch)
        facts = {
            "ntm.model.name": key.model,
            "ntm.model.version": key.version,
            "ntm.batch.sessions": len(batch.origins),
            "ntm.batch.rows": batch.inputs.shape[0],
            "ntm.batch.time_steps": batch.inputs.shape[1],
        }
        first, *others = origins
        began = time.time_ns()
        within = trace.set_span_in_context(NonRecordingSpan(first), Context())
        links = [Link(other) for other in others]
        with _span(self._tracer, "executor", context=within, kind=self._kind, links=links, attributes=facts) as span:
            try:
                return await self._executor.step(key, batch)
            finally:
                self._share(span.get_span_context(), others, began, facts)

    def _share(self, batch: SpanContext, others: list[SpanContext], began: int, facts: Mapping[str, Any]) -> None:
        ended = time.time_ns()
        for other in others:
            within = trace.set_span_in_context(NonRecordingSpan(other), Context())
            self._tracer.start_span(
                "executor", context=within, kind=self._kind, links=[Link(batch)], attributes=facts, start_time=began
            ).end(ended)


def _traced(
    tracer: trace.Tracer, name: str, kind: SpanKind, operation: Callable[..., Awaitable[Any]]
) -> Callable[..., Awaitable[Any]]:
    async def traced(*arguments: Any, **options: Any) -> Any:
        if not trace.get_current_span().get_span_context().is_valid:
            return await operation(*arguments, **options)
        with _span(tracer, name, kind=kind):
            return await operation(*arguments, **options)

    return traced


@contextmanager
def _span(tracer: trace.Tracer, name: str, **options: Any) -> Iterator[Span]:
    """A span around what is done within; of an error it keeps the reason."""
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False, **options) as span:
        try:
            yield span
        except BaseException as error:
            reason = reason_of(error)
            span.set_attribute("error.type", reason)
            span.set_status(Status(StatusCode.ERROR, reason if isinstance(error, ServiceError) else ""))
            raise
