"""A pipeline with the network and the clock in the test's hands, and a gateway that keeps the contract."""

import math
from collections import defaultdict

import grpc
import numpy as np
from google.protobuf.duration_pb2 import Duration
from google.rpc import error_details_pb2, status_pb2

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.client.blocks import Block
from service.client.pipeline import Pipeline
from service.client.retry import RetryPolicy
from service.client.steps import Line, Step
from service.columns import Columns

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
    return [*message.requests, *(request for columns in message.columns for request in Columns.of(columns).requests())]


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

    def block(self, *chunks, timeout=FOREVER):
        """Steps of one call: each a session's id and its values."""
        lines = [self.lines.setdefault(session_id, Line(session_id, 0)) for session_id, *_ in chunks]
        inputs = [np.array(values, np.float32).reshape(-1, 1) for _, *values in chunks]
        block = Block(lines, inputs, self.clock.now + timeout, self.ended.append)
        self.pipeline.submit(block)
        return block

    def tell(self):
        """Tells the callers of what has its outcome, as a driver does; ``ended`` says whom."""
        for finished in self.pipeline.take_finished():
            finished.done(finished)

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


def told(bench):
    """The stream, once the gateway has said on it that it takes columns."""
    bench.step("first", 0)
    stream, message = bench.send()
    assert not message.columns
    bench.answer(stream, message)
    bench.tell()
    return stream


def outputs(step):
    return step.result().ravel().tolist()
