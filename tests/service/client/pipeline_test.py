"""The rules of the client, with the network and the clock moved by hand."""

import math
from collections import defaultdict

import grpc
import numpy as np
import pytest
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.client.errors import GatewayError, PrecedingStepFailed, StepConflict
from service.client.pipeline import Pipeline
from service.client.retry import RetryPolicy
from service.client.steps import Line, Step
from service.columns import requests_of

FOREVER = 1e6


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def status(code, reason="", retry_after=None):
    answer = status_pb2.Status(code=code.value[0], message=reason.lower())
    if reason:
        answer.details.add().Pack(error_details_pb2.ErrorInfo(reason=reason, domain="ntm-serving"))
    if retry_after is not None:
        delay = Duration()
        delay.FromNanoseconds(int(retry_after * 1e9))
        answer.details.add().Pack(error_details_pb2.RetryInfo(retry_delay=delay))
    return answer


UNAVAILABLE = status(grpc.StatusCode.UNAVAILABLE, "STORE_UNAVAILABLE", 0.5)
UNKNOWN_COMMIT = status(grpc.StatusCode.UNAVAILABLE, "COMMIT_UNKNOWN", 0.5)
OVERLOADED = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", 0.1)
TOO_LARGE = status(grpc.StatusCode.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE")
DRAINING = status(grpc.StatusCode.UNAVAILABLE, "DRAINING", 0.1)
INVALID = status(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_TENSOR")


class SumGateway:
    """The gateway's contract in a dozen lines: a session sums its inputs, and each step is applied once."""

    def __init__(self):
        self.applied = defaultdict(list)
        self.last = {}

    def apply(self, request):
        """Runs one request as the real gateway would; returns its response."""
        x = np.frombuffer(request.inputs.content, "<f4").reshape(request.inputs.shape)
        history = self.applied[request.session_id]
        begin, content, reply = self.last.get(request.session_id, (None, None, None))
        answer = pb.StepResponse(request_id=request.request_id, session_id=request.session_id)
        if request.position == len(history):
            before = sum(history)
            history.extend(float(v) for v in x[:, 0])
            reply = (before + np.cumsum(x[:, 0], dtype=np.float32)).astype("<f4")
            self.last[request.session_id] = (request.position, request.inputs.content, reply)
        elif request.position != begin:
            answer.status.CopyFrom(status(grpc.StatusCode.ABORTED, "POSITION_MISMATCH"))
            return answer
        elif request.inputs.content != content:
            answer.status.CopyFrom(status(grpc.StatusCode.ABORTED, "STEP_CONFLICT"))
            return answer
        answer.position = request.position + len(x)
        answer.outputs.CopyFrom(tensor_pb2.Tensor(dtype=1, shape=[len(x), 1], content=reply.tobytes()))
        return answer


def in_columns(responses):
    """A message in which the results come as columns, those of each length together, and what failed by itself."""
    message = pb.StreamStepsResponse(takes_columns=True)
    alike = defaultdict(list)
    for response in responses:
        if response.HasField("status"):
            message.responses.append(response)
        else:
            alike[tuple(response.outputs.shape)].append(response)
    for shape, some in alike.items():
        content = b"".join(response.outputs.content for response in some)
        message.columns.add(
            request_ids=[response.request_id for response in some],
            positions=[response.position for response in some],
            outputs=tensor_pb2.Tensor(dtype=1, shape=[len(some), *shape], content=content),
        )
    return message


def requests_in(message):
    """All that a message asks for, whichever way."""
    return [*message.requests, *(request for columns in message.columns for request in requests_of(columns))]


class Bench:
    """A pipeline, its clock and a gateway, with the wire between them in the test's hands.

    With ``columns`` the gateway says that it takes them, and answers in them.
    """

    def __init__(self, columns=False, **options):
        self.columns = columns
        self.clock = Clock()
        self.gateway = SumGateway()
        options = {"policy": RetryPolicy(), "max_message_bytes": 10_000, **options}
        self.pipeline = Pipeline(clock=self.clock, **options)
        self.lines = {}
        self.ended = []

    def step(self, session_id, *values, timeout=FOREVER):
        line = self.lines.setdefault(session_id, Line(session_id, 0))
        inputs = np.array(values, np.float32).reshape(-1, 1)
        step = Step(line, inputs, self.clock.now + timeout, self.ended.append)
        self.pipeline.submit(step)
        return step

    def send(self):
        """What the pipeline sends now: the stream and the message, None where it sends nothing."""
        self.pipeline.tick()
        if self.pipeline.wants_stream():
            self.pipeline.open_stream()
        stream = self.pipeline.stream
        return stream, self.pipeline.take(stream) if stream else None

    def answer(self, stream, message):
        responses = [self.gateway.apply(request) for request in requests_in(message)]
        answer = in_columns(responses) if self.columns else pb.StreamStepsResponse(responses=responses)
        self.pipeline.received(answer, stream)

    def refuse(self, stream, message, why):
        responses = [pb.StepResponse(request_id=r.request_id, status=why) for r in requests_in(message)]
        self.pipeline.received(pb.StreamStepsResponse(responses=responses, takes_columns=self.columns), stream)

    def settle(self):
        """A network without faults from here on, until nothing is left to do."""
        for _ in range(10_000):
            stream, message = self.send()
            large = self.pipeline.take_large()
            if message is not None:
                self.answer(stream, message)
            elif large is not None:
                self.pipeline.answered(self.gateway.apply(large))
            elif math.isinf(wake := self.pipeline.wake_at()):
                return
            else:
                self.clock.now = max(self.clock.now, wake)
        raise AssertionError("it never comes to rest")


def ids(message):
    return [request.session_id for request in requests_in(message)]


def outputs(step):
    return step.result().ravel().tolist()


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


def test_the_same_step_again_is_taken_whether_its_failure_was_seen_or_not():
    bench = Bench()
    first = bench.step("a", 1)
    bench.refuse(*bench.send(), INVALID)
    again, behind = bench.step("a", 1), bench.step("a", 2)
    bench.settle()
    assert first.error is not None
    assert (outputs(again), outputs(behind)) == ([1], [3])


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


CHUNKS = st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=4), min_size=1, max_size=5)
FAULTS = st.sampled_from(
    ["answer", "reverse", "lose answers", "lose requests", "refuse", "overload", "drain", "unknown"]
)


def misbehave(bench, fault, stream, message):
    """One message meets one fault."""
    if fault == "answer":
        bench.answer(stream, message)
    elif fault == "reverse":
        bench.answer(stream, pb.StreamStepsRequest(requests=requests_in(message)[::-1]))
    elif fault == "refuse":
        bench.refuse(stream, message, UNAVAILABLE)
    elif fault == "overload":
        bench.refuse(stream, message, OVERLOADED)
    elif fault == "drain":
        bench.refuse(stream, message, DRAINING)
    else:
        if fault != "lose requests":
            for request in requests_in(message):
                bench.gateway.apply(request)
        if fault == "unknown":
            bench.refuse(stream, message, UNKNOWN_COMMIT)
        else:
            bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.UNAVAILABLE, fault))


@settings(deadline=None)
@given(sequences=st.lists(CHUNKS, min_size=1, max_size=4), faults=st.lists(FAULTS, max_size=20), columns=st.booleans())
def test_whatever_the_network_does_each_step_is_applied_once_and_in_order(sequences, faults, columns):
    bench = Bench(columns, policy=RetryPolicy(breaks=1000))
    steps = {
        (n, k): bench.step(f"s{n}", *chunk) for n, chunks in enumerate(sequences) for k, chunk in enumerate(chunks)
    }
    for fault in faults:
        stream, message = bench.send()
        if message is None:
            wake = bench.pipeline.wake_at()
            bench.clock.now = bench.clock.now if math.isinf(wake) else max(wake, bench.clock.now)
        else:
            assert len(set(ids(message))) == len(requests_in(message))
            misbehave(bench, fault, stream, message)
    bench.settle()
    for n, chunks in enumerate(sequences):
        whole = [float(value) for chunk in chunks for value in chunk]
        assert bench.gateway.applied[f"s{n}"] == whole
        got = [value for k in range(len(chunks)) for value in outputs(steps[n, k])]
        assert got == np.cumsum(whole).tolist()
        assert bench.lines[f"s{n}"].position == len(whole)
    assert len(bench.pipeline.take_finished()) == len(steps)


@settings(deadline=None)
@given(
    chunks=CHUNKS,
    faults=st.lists(FAULTS, max_size=12),
    impatience=st.lists(st.sampled_from(["wait", "cancel", "expire"]), max_size=12),
    columns=st.booleans(),
)
def test_a_caller_who_gives_up_and_repeats_gets_the_sequence_once(chunks, faults, impatience, columns):
    bench = Bench(columns, policy=RetryPolicy(breaks=1000))
    faults, impatience = iter(faults), iter(impatience)
    got = []
    for chunk in chunks:
        while True:
            mood = next(impatience, "wait")
            step = bench.step("a", *chunk, timeout=3 if mood == "expire" else FOREVER)
            stream, message = bench.send()
            if message is not None and requests_in(message):
                misbehave(bench, next(faults, "answer"), stream, message)
            if mood == "cancel":
                bench.pipeline.cancel(step)
            elif mood == "expire":
                bench.clock.now += 3
                bench.pipeline.tick()
            else:
                bench.settle()
            step.mark_seen()
            if step.outputs is not None:
                got += outputs(step)
                break
    whole = [float(value) for chunk in chunks for value in chunk]
    assert bench.gateway.applied["a"] == whole
    assert got == np.cumsum(whole).tolist()
