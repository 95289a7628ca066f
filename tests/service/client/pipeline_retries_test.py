"""Steps that are tried again, and those that are not."""

import math

import grpc
import pytest

from service.client.errors import GatewayError, StepConflict
from tests.service.client.pipeline_bench import (
    DRAINING,
    INVALID,
    OVERLOADED,
    TOO_LARGE,
    UNAVAILABLE,
    UNKNOWN_COMMIT,
    Bench,
    ids,
    outputs,
    status,
)


@pytest.mark.parametrize("why", [UNAVAILABLE, UNKNOWN_COMMIT, OVERLOADED, DRAINING], ids=lambda why: why.message)
def test_what_passes_is_tried_again_with_the_same_position(why):
    bench = Bench()
    step = bench.step("a", 5)
    stream, first = bench.send()
    bench.refuse(stream, first, why)
    assert bench.send()[1] is None  # not at once
    bench.clock.now = bench.pipeline.wake_at()
    stream, again = bench.send()
    assert again.requests[0].position == first.requests[0].position == 0
    assert again.requests[0].inputs == first.requests[0].inputs
    assert again.requests[0].request_id != first.requests[0].request_id
    bench.answer(stream, again)
    assert outputs(step) == [5]


@pytest.mark.parametrize("why", [INVALID, TOO_LARGE], ids=lambda why: why.message)
def test_what_does_not_pass_fails_at_once(why):
    bench = Bench()
    step = bench.step("a", 5)
    bench.refuse(*bench.send(), why)
    with pytest.raises(GatewayError, match=why.message):
        step.result()
    assert bench.lines["a"].position == 0
    bench.settle()
    assert not bench.gateway.applied


def test_a_retry_waits_as_long_as_the_gateway_asks_and_not_past_the_deadline():
    bench = Bench()
    bench.step("a", 5, timeout=10)
    late = bench.step("b", 5, timeout=0.4)
    bench.refuse(*bench.send(), UNAVAILABLE)  # asks for 0.5 s
    with pytest.raises(GatewayError, match="STORE_UNAVAILABLE"):
        late.result()
    bench.clock.now += 0.49
    assert bench.send()[1] is None
    bench.clock.now += 0.02
    assert ids(bench.send()[1]) == ["a"]


def test_steps_that_were_refused_together_are_sent_again_together():
    bench = Bench()
    for n in range(40):
        bench.step(f"s{n}", n)
    bench.refuse(*bench.send(), status(grpc.StatusCode.UNAVAILABLE, "EXECUTOR_UNAVAILABLE"))
    messages = 0
    while not math.isinf(wake := bench.pipeline.wake_at()) and wake < bench.clock.now + 100:
        bench.clock.now = max(wake, bench.clock.now)
        stream, message = bench.send()
        if message is not None:
            messages += 1
            bench.answer(stream, message)
    assert messages <= 4


def test_another_step_after_a_lost_answer_gets_the_gateways_verdict():
    bench = Bench()
    step = bench.step("a", 5, timeout=2)
    _, message = bench.send()
    bench.gateway.apply(message.requests[0])
    bench.clock.now += 2
    bench.pipeline.tick()
    with pytest.raises(GatewayError, match="DEADLINE_EXCEEDED"):
        step.result()
    other = bench.step("a", 6)
    bench.settle()
    with pytest.raises(StepConflict):
        other.result()
    again, then = bench.step("a", 5), bench.step("a", 6)
    bench.settle()
    assert (outputs(again), outputs(then)) == ([5], [11])


def test_the_same_step_again_is_taken_whether_its_failure_was_seen_or_not():
    bench = Bench()
    first = bench.step("a", 1)
    bench.refuse(*bench.send(), INVALID)
    again, behind = bench.step("a", 1), bench.step("a", 2)
    bench.settle()
    assert first.error is not None
    assert (outputs(again), outputs(behind)) == ([1], [3])
