"""The rules of the client, with the network and the clock moved by hand."""

import grpc
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client.errors import GatewayError, PrecedingStepFailed
from tests.service.client.pipeline_bench import INVALID, Bench, ids, outputs


def test_all_the_steps_that_wait_go_into_one_message():
    bench = Bench()
    steps = [bench.step(f"s{n}", n) for n in range(50)]
    stream, message = bench.send()
    assert len(message.requests) == 50
    assert bench.send()[1] is None
    bench.answer(stream, message)
    assert [outputs(step) for step in steps] == [[n] for n in range(50)]


def test_a_message_is_split_below_its_size_limit():
    bench = Bench(max_message_bytes=4000)
    steps = [bench.step(f"s{n}", *range(100)) for n in range(20)]  # 400 bytes each
    sizes = []
    while (sent := bench.send())[1] is not None:
        sizes.append(sent[1].ByteSize())
        bench.answer(*sent)
    assert len(sizes) > 1
    assert max(sizes) <= 4000
    assert all(len(step.result()) == 100 for step in steps)


def test_a_step_that_is_larger_than_a_message_goes_alone():
    bench = Bench(max_message_bytes=1024)
    small, large = bench.step("small", 1), bench.step("large", *range(1000))
    stream, message = bench.send()
    assert ids(message) == ["small"]
    request = bench.pipeline.take_large()
    assert request.session_id == "large"
    assert bench.pipeline.take_large() is None
    bench.answer(stream, message)
    bench.pipeline.refused(request.request_id, GatewayError(grpc.StatusCode.UNAVAILABLE, "later"))
    bench.settle()
    assert outputs(small) == [1]
    assert len(large.result()) == 1000


def test_one_step_of_a_session_is_on_its_way_and_the_others_wait_in_order():
    bench = Bench()
    steps = [bench.step("a", value) for value in (1, 2, 3)]
    positions = []
    for _ in steps:
        stream, message = bench.send()
        (request,) = message.requests
        positions.append(request.position)
        bench.answer(stream, message)
    assert positions == [0, 1, 2]
    assert [outputs(step) for step in steps] == [[1], [3], [6]]
    assert bench.lines["a"].position == 3


def test_a_deadline_passes_and_the_gateway_is_told():
    bench = Bench()
    step = bench.step("a", 5, timeout=2)
    stream, message = bench.send()
    assert 1.9 < message.requests[0].timeout.seconds + message.requests[0].timeout.nanos / 1e9 <= 2
    assert bench.pipeline.wake_at() == bench.clock.now + 2
    bench.clock.now += 2
    stream, told = bench.send()
    assert list(told.cancel) == [message.requests[0].request_id]
    with pytest.raises(GatewayError) as caught:
        step.result()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert caught.value.outcome_unknown
    bench.answer(stream, message)  # too late: nobody waits
    again = bench.step("a", 5)
    bench.settle()
    assert outputs(again) == [5]
    assert bench.gateway.applied["a"] == [5]


def test_a_step_given_up_before_it_was_sent_is_never_sent():
    bench = Bench()
    step = bench.step("a", 5)
    bench.pipeline.cancel(step)
    assert bench.send()[1] is None
    assert not bench.pipeline.has_message()
    assert step.error.reason == "CANCELLED"


def test_a_step_by_itself_takes_along_what_is_given_up():
    bench = Bench()
    given_up = bench.step("a", 5)
    _, message = bench.send()
    bench.pipeline.cancel(given_up)
    bench.step("b", 6)
    _, told = bench.send()
    assert (ids(told), list(told.cancel)) == (["b"], [message.requests[0].request_id])
    assert bench.send()[1] is None


def test_steps_behind_one_that_fails_are_not_sent_in_its_place():
    bench = Bench()
    first, behind = bench.step("a", 1), bench.step("a", 2)
    bench.refuse(*bench.send(), INVALID)
    unaware = bench.step("a", 3)  # asked for by somebody who has not looked at `first` yet
    for step in (behind, unaware):
        assert isinstance(step.error, PrecedingStepFailed)
        assert step.error.__cause__ is first.error
    assert bench.send()[1] is None
    with pytest.raises(GatewayError, match="INVALID_TENSOR"):
        first.result()
    knowing = bench.step("a", 3)
    bench.settle()
    assert outputs(knowing) == [3]


def test_a_waiting_step_that_expires_takes_those_behind_it_along():
    bench = Bench()
    first, second, third = bench.step("a", 1), bench.step("a", 2, timeout=1), bench.step("a", 3)
    stream, message = bench.send()
    bench.clock.now += 1
    bench.pipeline.tick()
    assert second.error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert isinstance(third.error, PrecedingStepFailed)
    bench.answer(stream, message)
    assert outputs(first) == [1]
    assert bench.lines["a"].tail == bench.lines["a"].position == 1


def test_a_cancelled_step_whose_outputs_nobody_got_can_be_had_again():
    bench = Bench()
    step = bench.step("a", 4)
    bench.answer(*bench.send())
    assert bench.lines["a"].position == 1
    bench.pipeline.cancel(step)  # its caller went away before it could look
    assert bench.lines["a"].position == 0
    again = bench.step("a", 4)
    bench.settle()
    assert outputs(again) == [4]
    bench.pipeline.cancel(step)  # once more changes nothing
    assert bench.lines["a"].position == 1


def test_an_answer_that_makes_no_sense_is_an_error():
    bench = Bench()
    step = bench.step("a", 1)
    stream, message = bench.send()
    response = bench.gateway.apply(message.requests[0])
    response.position = 7
    bench.pipeline.received(pb.StreamStepsResponse(responses=[response]), stream)
    with pytest.raises(GatewayError, match="position is 7 after a step that ends at 1"):
        step.result()


def test_closing_fails_what_waits_and_takes_nothing_more():
    bench = Bench()
    steps = [bench.step("a", 1), bench.step("a", 2), bench.step("b", 3)]
    bench.pipeline.close_line(bench.lines["a"], "session a is closed")
    assert [step.finished for step in steps] == [True, True, False]
    bench.pipeline.close("the client is closed")
    late = bench.step("c", 1)
    for step in (steps[0], steps[2], late):
        assert step.error.reason == "CLOSED"
    assert len(bench.pipeline.take_finished()) == 4
    assert not bench.pipeline.wants_stream()
