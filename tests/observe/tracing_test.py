import asyncio
import subprocess
import sys
import threading
from concurrent import futures

import grpc
import numpy as np
import pytest
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import AsyncSequenceClient, GatewayError, SequenceClient
from service.tracing import Tracing, provider_from_environment
from service.types import VersionKey
from tests.service.support import NumpyExecutor, random_inputs, running_gateway, step_request


class Recorded:
    """A tracer provider that keeps its spans here."""

    def __init__(self, **options):
        self._exporter = InMemorySpanExporter()
        self.provider = TracerProvider(**options)
        self.provider.add_span_processor(SimpleSpanProcessor(self._exporter))

    @property
    def tracing(self):
        return Tracing(self.provider)

    @property
    def spans(self):
        return self._exporter.get_finished_spans()

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def one(self, name):
        (span,) = self.named(name)
        return span


async def until(true):
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)


def parent_of(span):
    return span.parent.span_id if span.parent else None


def id_of(span):
    return span.context.span_id


async def test_one_trace_goes_from_the_client_through_gateway_and_executor_to_the_store():
    client_side, gateway_side = Recorded(), Recorded()
    tracer = client_side.provider.get_tracer("the application")
    async with (
        running_gateway(tracing=gateway_side.tracing) as running,
        AsyncSequenceClient(running.target, tracer_provider=client_side.provider) as client,
    ):
        session = await client.create_session("sums")
        with tracer.start_as_current_span("application") as application:
            await session.step(random_inputs(3))
    sent, step = client_side.one("step"), gateway_side.one("step")
    assert parent_of(sent) == application.get_span_context().span_id
    assert sent.kind is SpanKind.CLIENT
    assert parent_of(step) == id_of(sent)
    for name in ("store load", "executor", "store commit"):
        inner = gateway_side.one(name)
        assert parent_of(inner) == id_of(step)
        assert inner.context.trace_id == application.get_span_context().trace_id
    executor = gateway_side.one("executor")
    assert executor.attributes["ntm.model.name"] == "sums"
    assert executor.attributes["ntm.batch.sessions"] == 1
    assert step.start_time <= executor.start_time <= executor.end_time <= gateway_side.one("store commit").end_time
    assert gateway_side.one("store commit").end_time <= step.end_time


@pytest.mark.parametrize("size", [3, 2000])
async def test_the_blocking_client_traces_steps_in_streams_and_those_sent_alone(size):
    both = Recorded()

    def use(target):
        with SequenceClient(target, tracer_provider=both.provider, max_message_bytes=4096) as client:
            client.create_session("sums").step(random_inputs(size))

    async with running_gateway(tracing=both.tracing) as running:
        await asyncio.to_thread(use, running.target)
    sent, ran = sorted(both.named("step"), key=lambda span: span.kind is not SpanKind.CLIENT)
    assert parent_of(ran) == id_of(sent)
    create = both.named("ntm_serving.v1.SequenceService/CreateSession")
    by_kind = {span.kind: span for span in create}
    assert parent_of(by_kind[SpanKind.SERVER]) == id_of(by_kind[SpanKind.CLIENT])
    assert parent_of(both.one("store create")) == id_of(by_kind[SpanKind.SERVER])
    assert by_kind[SpanKind.SERVER].attributes["rpc.grpc.status_code"] == 0


async def test_a_batch_shows_in_the_trace_of_each_of_its_steps():
    recorded = Recorded()
    executor = NumpyExecutor()
    tracer = recorded.provider.get_tracer("clients")
    async with running_gateway(executor, tracing=recorded.tracing) as running:
        for name in ("first", "a", "b", "c"):
            await running.create(name)
        executor.hold()
        first = asyncio.ensure_future(running.stub.Step(step_request("first", random_inputs(1), 0)))
        await executor.entered.wait()
        requests, roots = [], []
        for name in ("a", "b", "c"):
            root = tracer.start_span(name).get_span_context()
            roots.append(root)
            request = step_request(name, random_inputs(1), 0)
            request.traceparent = f"00-{root.trace_id:032x}-{root.span_id:016x}-01"
            requests.append(request)
        waiting = asyncio.ensure_future(running.stub.BatchStep(pb.BatchStepRequest(requests=requests)))
        await until(lambda: running.gateway.engine._batcher.queued() == {VersionKey("sums", 1): 3})
        executor.gate.set()
        await asyncio.gather(first, waiting)
    runs = [span for span in recorded.named("executor") if span.context.trace_id in {r.trace_id for r in roots}]
    assert {span.context.trace_id for span in runs} == {root.trace_id for root in roots}
    assert all(span.attributes["ntm.batch.sessions"] == 3 for span in runs)
    (batch,) = [span for span in runs if len(span.links) == 2]
    steps = {span.context.trace_id: span for span in recorded.named("step")}
    assert {link.context.span_id for link in batch.links} | {parent_of(batch)} == {
        id_of(steps[root.trace_id]) for root in roots
    }
    for span in runs:
        assert parent_of(span) == id_of(steps[span.context.trace_id])
        if span is not batch:
            assert [link.context.span_id for link in span.links] == [id_of(batch)]
            assert span.start_time <= batch.start_time
            assert span.end_time <= batch.end_time


async def test_a_step_of_a_stream_without_a_context_begins_a_trace_and_points_to_the_stream():
    recorded = Recorded()
    async with running_gateway(tracing=recorded.tracing) as running:
        await running.create("a")
        stream = running.stub.StreamSteps()
        for position, told in enumerate(("", "not a traceparent")):
            request = step_request("a", random_inputs(1, position), position)
            request.traceparent = told
            await stream.write(pb.StreamStepsRequest(requests=[request]))
            assert not (await stream.read()).responses[0].HasField("status")
        columns = pb.StepColumns(request_ids=[""], session_ids=["a"], positions=[2])
        columns.inputs.CopyFrom(step_request("a", random_inputs(1, 2), 2).inputs)
        columns.inputs.shape.insert(0, 1)
        await stream.write(pb.StreamStepsRequest(columns=[columns]))
        assert not (await stream.read()).responses[0].HasField("status")
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF
    whole = recorded.one("ntm_serving.v1.SequenceService/StreamSteps")
    steps = recorded.named("step")
    assert len(steps) == 3
    for step in steps:
        assert step.parent is None
        assert [link.context.span_id for link in step.links] == [id_of(whole)]
    assert len({step.context.trace_id for step in steps} | {whole.context.trace_id}) == 4


async def test_a_failure_shows_by_its_reason_and_nothing_tells_of_who_or_what():
    both = Recorded()
    executor = NumpyExecutor()
    async with (
        running_gateway(executor, tracing=both.tracing) as running,
        AsyncSequenceClient(running.target, tracer_provider=both.provider) as client,
    ):
        session = await client.create_session("sums", session_id="the-session")
        with pytest.raises(GatewayError):
            await session.step(np.full((1, 2), np.nan, np.float32))
        with pytest.raises(GatewayError):
            await client.create_session("no-such-model")
    assert {span.attributes["error.type"] for span in both.named("step")} == {"INVALID_TENSOR"}
    creates = both.named("ntm_serving.v1.SequenceService/CreateSession")
    (refused,) = [span for span in creates if span.attributes.get("rpc.grpc.status_code")]
    assert refused.attributes["rpc.grpc.status_code"] == grpc.StatusCode.NOT_FOUND.value[0]
    for span in both.spans:
        shown = span.to_json()
        assert "the-session" not in shown
        assert "no-such-model" not in shown
        assert not span.events


async def test_what_is_not_sampled_leaves_no_span_and_works():
    recorded = Recorded(sampler=ALWAYS_OFF)
    async with (
        running_gateway(tracing=recorded.tracing) as running,
        AsyncSequenceClient(running.target, tracer_provider=recorded.provider) as client,
    ):
        session = await client.create_session("sums")
        await session.step(random_inputs(3))
    assert not recorded.spans


async def test_the_standard_environment_says_where_spans_go(monkeypatch):
    received = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(self, request, context):  # noqa: N802 - the rpc's name
            received.extend(request.resource_spans)
            return trace_service_pb2.ExportTraceServiceResponse()

    collector = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), collector)
    port = collector.add_insecure_port("127.0.0.1:0")
    collector.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    try:
        async with running_gateway(tracing=Tracing(provider_from_environment())) as running:
            await running.create("a")
            await running.stub.Step(step_request("a", random_inputs(1), 0))
        # Draining has sent what was held.
        names = {span.name for found in received for scope in found.scope_spans for span in scope.spans}
        assert {"step", "executor", "store commit", "ntm_serving.v1.SequenceService/Step"} <= names
        told = {pair.key: pair.value.string_value for pair in received[0].resource.attributes}
        assert told["service.name"] == "ntm-gateway"
        assert told["deployment.environment.name"] == "test"
    finally:
        collector.stop(0)


def test_neither_traces_nor_metrics_are_imported_unless_asked_for():
    code = (
        "import service.server, service.client, sys;"
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'prometheus'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_global_provider_is_left_alone():
    before = trace.get_tracer_provider()
    provider_from_environment().shutdown()
    assert trace.get_tracer_provider() is before


def test_a_collector_that_is_not_there_does_not_hold_up_the_end():
    class Stuck:
        def __init__(self):
            self.let_go = threading.Event()

        def get_tracer(self, name):
            return trace.NoOpTracer()

        def shutdown(self):
            self.let_go.wait(60)

    provider = Stuck()
    Tracing(provider).close(limit=0.01)
    assert not provider.let_go.is_set()
    provider.let_go.set()
