"""Messages of one step: whatever a stream is sent, what comes of it says the same as the message."""

import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.lone import StreamMessages
from tests.service.support import random_inputs, step_request

SIZES = st.integers(0, 40) | st.integers(100, 140) | st.integers(4000, 4200)


def as_message(parsed):
    return pb.StreamStepsRequest(requests=[parsed]) if isinstance(parsed, pb.StepRequest) else parsed


def step_of(size):
    """A request of about so many bytes; of none at all where there is no size."""
    return step_request("s", random_inputs(size // 16 + 1), size) if size else pb.StepRequest()


@given(st.lists(SIZES, max_size=3), st.booleans(), st.booleans(), st.integers(1, 20_000))
def test_one_step_and_nothing_else_is_parsed_as_that_step(sizes, cancels, columns, max_bytes):
    message = pb.StreamStepsRequest(requests=[step_of(size) for size in sizes], cancel=["a"] * cancels)
    if columns:
        message.columns.add(request_ids=["a"])
    data = message.SerializeToString()
    parsed = StreamMessages(max_bytes).parse(data)
    assert as_message(parsed) == message
    alone = len(sizes) == 1 and not (cancels or columns)
    assert isinstance(parsed, pb.StepRequest) == (alone and 2 < len(data) <= min(max_bytes, 16_384))


@given(st.binary(max_size=60) | st.binary(max_size=60).map(lambda tail: b"\x0a" + tail))
@example(b"\x0a\x80")
@example(b"\x0a\x80\x80\x00")
@example(b"\x0a\x82\x00\x0a\x00")  # a length in more bytes than it takes
@example(b"\x0a\x82\x80\x00\x0a\x00")
def test_any_bytes_say_what_they_say_to_the_parser(data):
    try:
        expected = pb.StreamStepsRequest.FromString(data)
    except DecodeError:
        with pytest.raises(DecodeError):
            StreamMessages().parse(data)
    else:
        assert as_message(StreamMessages().parse(data)) == expected
