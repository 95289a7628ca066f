"""Streams that break, are refused or drain: what becomes of the steps on them."""

import grpc
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client.errors import GatewayError
from service.client.retry import RetryPolicy
from tests.service.client.pipeline_bench import DRAINING, Bench, ids, outputs


def test_a_broken_stream_is_opened_anew_and_nothing_on_it_is_lost_or_repeated():
    bench = Bench()
    applied, lost = bench.step("applied", 1), bench.step("lost", 2)
    stream, message = bench.send()
    for request in message.requests:
        if request.session_id == "applied":
            bench.gateway.apply(request)  # and its answer never arrives
    bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.UNAVAILABLE, "connection reset"))
    assert not bench.pipeline.wants_stream()
    bench.settle()
    assert (outputs(applied), outputs(lost)) == ([1], [2])
    assert bench.gateway.applied == {"applied": [1], "lost": [2]}


def test_a_stream_that_is_refused_for_good_fails_what_waits():
    bench = Bench()
    step = bench.step("a", 1)
    stream = bench.pipeline.open_stream()
    bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.UNAUTHENTICATED, "no such token"))
    with pytest.raises(GatewayError, match="no such token"):
        step.result()


def test_a_stream_that_breaks_without_end_is_given_up():
    bench = Bench(policy=RetryPolicy(breaks=3))
    step = bench.step("a", 1)
    breaks = 0
    while not step.finished:
        bench.clock.now = max(bench.clock.now, bench.pipeline.wake_at()) if breaks else bench.clock.now
        stream, _ = bench.send()
        bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.INTERNAL, "bug"))
        breaks += 1
    assert breaks == 4
    assert step.error.code() is grpc.StatusCode.INTERNAL


def test_breaks_with_answers_in_between_are_not_counted_together():
    bench = Bench(policy=RetryPolicy(breaks=1))
    for value in range(5):
        step = bench.step("a", value)
        bench.pipeline.stream_ended(bench.send()[0], GatewayError(grpc.StatusCode.INTERNAL, "now and then"))
        bench.settle()
        step.result()
    assert bench.gateway.applied["a"] == list(range(5))


def test_a_stream_that_breaks_too_late_for_another_try_fails_its_steps_with_its_error():
    bench = Bench(policy=RetryPolicy(initial=1))
    late, patient = bench.step("late", 1, timeout=0.1), bench.step("patient", 1)
    bench.pipeline.stream_ended(bench.send()[0], GatewayError(grpc.StatusCode.UNAVAILABLE, "connection reset"))
    with pytest.raises(GatewayError, match="connection reset"):
        late.result()
    bench.settle()
    assert outputs(patient) == [1]


def test_a_draining_gateway_gets_nothing_more_and_answers_what_it_has():
    bench = Bench()
    refused, running = bench.step("refused", 1), bench.step("running", 2)
    old, message = bench.send()
    bench.refuse(old, pb.StreamStepsRequest(requests=message.requests[:1]), DRAINING)
    bench.clock.now = bench.pipeline.wake_at()
    new, again = bench.send()
    assert new != old
    assert ids(again) == ["refused"]
    assert bench.pipeline.take(old) is None
    bench.answer(old, pb.StreamStepsRequest(requests=message.requests[1:]))
    bench.pipeline.stream_ended(old, None)
    bench.answer(new, again)
    assert (outputs(refused), outputs(running)) == ([1], [2])
