"""Whatever the network and the caller do: each step is applied once, and in order."""

import math

import grpc
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client.errors import GatewayError
from service.client.retry import RetryPolicy
from tests.service.client.pipeline_bench import (
    DRAINING,
    FOREVER,
    OVERLOADED,
    UNAVAILABLE,
    UNKNOWN_COMMIT,
    Bench,
    ids,
    outputs,
    requests_in,
)

CHUNKS = st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=4), min_size=1, max_size=5)
FAULTS = st.sampled_from(
    [
        "answer",
        "reverse",
        "in parts",
        "twice",
        "refuse some",
        "lose some",
        "lose answers",
        "lose requests",
        "refuse",
        "overload",
        "drain",
        "unknown",
    ]
)


def misbehave(bench, fault, stream, message):
    """One message meets one fault."""
    requests = requests_in(message)
    some, rest = (pb.StreamStepsRequest(requests=part) for part in (requests[::2], requests[1::2]))
    if fault in ("in parts", "twice"):
        bench.answer(stream, rest)
        bench.answer(stream, some if fault == "in parts" else message)
    elif fault == "refuse some":
        bench.refuse(stream, some, UNAVAILABLE)
        bench.answer(stream, rest)
    elif fault == "lose some":
        bench.answer(stream, some)
        misbehave(bench, "lose answers", stream, rest)
    elif fault == "answer":
        bench.answer(stream, message)
    elif fault == "reverse":
        bench.answer(stream, pb.StreamStepsRequest(requests=requests[::-1]))
    elif fault == "refuse":
        bench.refuse(stream, message, UNAVAILABLE)
    elif fault == "overload":
        bench.refuse(stream, message, OVERLOADED)
    elif fault == "drain":
        bench.refuse(stream, message, DRAINING)
    else:
        if fault != "lose requests":
            for request in requests:
                bench.gateway.apply(request)
        if fault == "unknown":
            bench.refuse(stream, message, UNKNOWN_COMMIT)
        else:
            bench.pipeline.stream_ended(stream, GatewayError(grpc.StatusCode.UNAVAILABLE, fault))


def meet(bench, faults):
    """Each message meets a fault; where there is none, time passes."""
    for fault in faults:
        stream, message = bench.send()
        if message is None:
            wake = bench.pipeline.wake_at()
            bench.clock.now = bench.clock.now if math.isinf(wake) else max(wake, bench.clock.now)
        else:
            assert len(set(ids(message))) == len(requests_in(message))
            misbehave(bench, fault, stream, message)


@settings(deadline=None)
@given(sequences=st.lists(CHUNKS, min_size=1, max_size=4), faults=st.lists(FAULTS, max_size=20), columns=st.booleans())
def test_whatever_the_network_does_each_step_is_applied_once_and_in_order(sequences, faults, columns):
    bench = Bench(columns, policy=RetryPolicy(breaks=1000))
    steps = {
        (n, k): bench.step(f"s{n}", *chunk) for n, chunks in enumerate(sequences) for k, chunk in enumerate(chunks)
    }
    meet(bench, faults)
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
