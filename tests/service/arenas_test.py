"""Messages that share their memory: they are as any others, however long each of them is kept."""

import gc

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.arenas import Arena
from tests.service.support import random_inputs, step_request


@pytest.fixture(autouse=True, scope="module")
def others_are_not_looked_through():
    """Looking through all that other tests have brought along takes a third of a second each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def request_of(number, steps):
    return pb.StreamStepsRequest(requests=[step_request(f"s{number}", random_inputs(steps, number), number)])


@given(st.lists(st.tuples(st.integers(1, 60) | st.integers(150, 300), st.booleans()), max_size=60))
def test_each_is_parsed_by_itself_and_outlives_the_others(plan):
    """Some are kept and some are not, of every size, many times as many as share their memory."""
    arena, kept = Arena(pb.StreamStepsRequest), []
    for number, (steps, keep) in enumerate(plan):
        message = arena.parse(request_of(number, steps).SerializeToString())
        assert message == request_of(number, steps)
        if keep:
            kept.append((number, steps, message))
    del arena
    gc.collect()
    for number, steps, message in kept:
        assert message == request_of(number, steps)


@given(st.binary(max_size=100))
def test_bytes_that_are_no_message_are_refused_as_ever_and_leave_nothing_behind(data):
    arena = Arena(pb.StreamStepsRequest)
    try:
        expected = pb.StreamStepsRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            arena.parse(data)
    else:
        assert arena.parse(data).SerializeToString() == expected.SerializeToString()
    assert arena.parse(request_of(1, 2).SerializeToString()) == request_of(1, 2)


def test_there_may_be_several_of_one_type():
    data = request_of(3, 1).SerializeToString()
    assert Arena(pb.StreamStepsRequest).parse(data) == Arena(pb.StreamStepsRequest).parse(data)
