"""Spans of the client's calls and steps, for a caller who hands it an OpenTelemetry tracer provider.

A call carries its trace context in its metadata. Steps of many traces share a stream, so each carries its own, in
``StepRequest.traceparent``.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import propagate, trace
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from service.client.blocks import Block
from service.client.errors import GatewayError
from service.client.steps import Step

_W3C = TraceContextTextMapPropagator()


class ClientTracing:
    """Makes the client's spans, children of whatever span is current where it is called.

    Args:
        provider: Makes tracers.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._tracer = provider.get_tracer("ntm-serving-client")

    @contextmanager
    def call(self, path: str) -> Iterator[tuple[tuple[str, str], ...]]:
        """A span around a call and its repetitions; gives the metadata to send with each."""
        name = path[1:]
        with self._tracer.start_as_current_span(
            name, kind=SpanKind.CLIENT, record_exception=False, set_status_on_exception=False
        ) as span:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            try:
                yield tuple(carrier.items())
            except GatewayError as error:
                _mark_failed(span, error)
                raise

    def begin(self, taken: Step | Block) -> None:
        """Gives steps that are taken on their spans. Those of a block go by themselves then, each in its own trace."""
        for step in taken.split() if isinstance(taken, Block) else [taken]:
            span = self._tracer.start_span("step", kind=SpanKind.CLIENT)
            carrier: dict[str, str] = {}
            _W3C.inject(carrier, trace.set_span_in_context(span))
            step.span = span
            step.traceparent = carrier.get("traceparent", "")

    def end(self, step: Step | Block) -> None:
        """Ends the span of a step that has its outcome."""
        if isinstance(step, Step) and isinstance(span := step.span, Span):
            if step.error is not None:
                _mark_failed(span, step.error)
            span.end()
            step.span = None


def _mark_failed(span: Span, error: GatewayError) -> None:
    span.set_attribute("error.type", error.reason or error.code().name)
    span.set_status(Status(StatusCode.ERROR))
