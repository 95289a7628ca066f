import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service import codec
from service.alike import parse_requests
from service.answers import Answers
from service.errors import InvalidArgument, InvalidId, InvalidTensor, MessageTooLarge
from service.types import StepReply

FLOAT32 = tensor_pb2.DATA_TYPE_FLOAT32
LIMIT = 1_000_000
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)


def tensor(array, **changes):
    fields = {"dtype": FLOAT32, "shape": array.shape, "content": array.astype("<f4").tobytes(), **changes}
    return tensor_pb2.Tensor(**fields)


@given(hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7), elements=finite))
def test_inputs_survive_the_way_out_and_back(array):
    parsed, digest = codec.parse_inputs(codec.render_tensor(array), LIMIT)
    assert parsed.dtype == np.float32
    np.testing.assert_array_equal(parsed, array)
    shape = f"f4:{array.shape[0]}:{array.shape[1]}:".encode()
    assert digest == hashlib.sha256(shape + array.tobytes()).digest()


def test_the_digest_tells_shapes_with_the_same_bytes_apart():
    array = np.arange(6, dtype=np.float32)
    digests = {
        codec.parse_inputs(codec.render_tensor(array.reshape(shape)), LIMIT)[1] for shape in [(2, 3), (3, 2), (6, 1)]
    }
    assert len(digests) == 3


def test_a_big_endian_or_strided_array_is_sent_little_endian_and_row_major():
    array = np.arange(12, dtype=">f4").reshape(3, 4)
    assert codec.render_tensor(array.T).content == np.arange(12, dtype="<f4").reshape(3, 4).T.tobytes()


@pytest.mark.parametrize(
    ("changes", "field", "says"),
    [
        ({"dtype": 0}, "inputs.dtype", "expected DATA_TYPE_FLOAT32"),
        ({"dtype": 99}, "inputs.dtype", "99"),
        ({"shape": ()}, "inputs.shape", "[time, input_dim]"),
        ({"shape": (6,)}, "inputs.shape", "[time, input_dim]"),
        ({"shape": (1, 2, 3)}, "inputs.shape", "[time, input_dim]"),
        ({"shape": (-2, -3)}, "inputs.shape", "[time, input_dim]"),
        ({"shape": (2, 0)}, "inputs.shape", "[time, input_dim]"),
        ({"shape": (0, 3), "content": b""}, "inputs.shape", "at least one time step"),
        ({"shape": (-1, 3)}, "inputs.shape", "at least one time step"),
        ({"content": b"\0" * 23}, "inputs.content", "takes 24"),
        ({"content": b""}, "inputs.content", "0 bytes"),
        ({"shape": (2**62, 2**62)}, "inputs.content", "24 bytes"),
    ],
)
def test_a_wrong_tensor_is_refused_by_the_field_that_is_wrong(changes, field, says):
    with pytest.raises(InvalidTensor) as caught:
        codec.parse_inputs(tensor(np.zeros((2, 3), np.float32), **changes), LIMIT)
    assert caught.value.field == field
    assert says in caught.value.message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_and_found(value):
    array = np.zeros((3, 4), np.float32)
    array[1, 2] = value
    with pytest.raises(InvalidTensor, match=r"inputs\[1, 2\]") as caught:
        codec.parse_inputs(tensor(array), LIMIT)
    assert caught.value.field == "inputs.content"


def test_infinities_that_cancel_are_found():
    with pytest.raises(InvalidTensor):
        codec.parse_inputs(tensor(np.array([[np.inf, -np.inf]], np.float32)), LIMIT)


def test_finite_values_whose_sum_overflows_are_taken():
    array = np.full((2, 4), np.finfo(np.float32).max, np.float32)
    np.testing.assert_array_equal(codec.parse_inputs(tensor(array), LIMIT)[0], array)


@pytest.mark.parametrize("good", ["a", "A-Z_09", "x" * 64])
def test_ids_that_are_taken(good):
    assert codec.parse_id(good, "session_id") == good


@given(st.text(max_size=70).filter(lambda text: not codec._ID.match(text)))
def test_ids_that_are_refused(bad):
    with pytest.raises(InvalidId) as caught:
        codec.parse_id(bad, "session_id")
    assert caught.value.field == "session_id"


@pytest.mark.parametrize("bad", ["", "x" * 65, "a/b", "..", "a\n", "ä", "a b"])
def test_ids_that_could_name_something_else_are_refused(bad):
    with pytest.raises(InvalidId):
        codec.parse_id(bad, "model.name")


def step(**changes):
    fields = {"session_id": "s", "inputs": tensor(np.zeros((2, 3), np.float32)), **changes}
    return pb.StepRequest(**fields)


def test_a_step_without_a_position_is_told_from_one_at_zero():
    assert codec.parse_step(step(), "p", 1.0, 100).position is None
    assert codec.parse_step(step(position=0), "p", 1.0, 100).position == 0


def test_a_step_s_other_fields_are_checked():
    with pytest.raises(InvalidArgument, match="position is -1"):
        codec.parse_step(step(position=-1), "p", 1.0, 100)
    with pytest.raises(InvalidArgument, match="request_id has 65"):
        codec.parse_step(step(request_id="r" * 65), "p", 1.0, 100)
    with pytest.raises(MessageTooLarge, match="24 bytes; at most 23"):
        codec.parse_step(step(), "p", 1.0, 23)


def test_times():
    request = step()
    assert codec.parse_timeout(request) is None
    request.timeout.FromMilliseconds(1500)
    assert codec.parse_timeout(request) == 1.5
    request.timeout.FromMilliseconds(-1)
    with pytest.raises(InvalidArgument):
        codec.parse_timeout(request)
    assert codec.parse_ttl(None, 60, 3600) == 60
    for seconds in (0, -5, 3601):
        with pytest.raises(InvalidArgument) as caught:
            codec.parse_ttl(type(request.timeout)(seconds=seconds), 60, 3600)
        assert caught.value.field == "ttl"


ODD = {
    "negative": lambda request: set_shape(request, [-size for size in request.inputs.shape]),
    "turned": lambda request: set_shape(request, request.inputs.shape[::-1]),
    "rank": lambda request: request.inputs.shape.append(1),
    "empty": lambda request: request.inputs.shape.__setitem__(0, 0),
    "bytes": lambda request: setattr(request.inputs, "content", request.inputs.content[:-1]),
    "dtype": lambda request: setattr(request.inputs, "dtype", 0),
    "nan": lambda request: setattr(request.inputs, "content", b"\0\0\xc0\x7f" + request.inputs.content[4:]),
    "id": lambda request: setattr(request, "request_id", "r" * 65),
    "long": lambda request: request.inputs.CopyFrom(tensor(np.zeros((50, 2), np.float32))),
    "no time": lambda request: request.timeout.FromNanoseconds(0),
    "past": lambda request: request.timeout.FromNanoseconds(-1),
}


def set_shape(request, shape):
    request.inputs.shape[:] = shape


def is_refused(request):
    try:
        codec.parse_timeout(request)
        codec.parse_step(request, "p", 1.0, 100)
    except (InvalidArgument, InvalidTensor, MessageTooLarge):
        return True
    return False


LIMITS = st.sampled_from([None, 1, 999_999_999, 1_000_000_000, 1_000_000_001, 60 * 10**9])
LOOKS = st.integers(1, 3), st.sampled_from([2, 3]), LIMITS
POSITIONS = st.one_of(st.none(), st.integers(0, 9))


@st.composite
def all_alike(draw):
    """Steps of one look, of which one may be odd."""
    look = [draw(part) for part in LOOKS]
    wanted = [(*look, position, None) for position in draw(st.lists(POSITIONS, min_size=1, max_size=6))]
    at = draw(st.integers(-12, len(wanted) - 1))
    if at >= 0:
        wanted[at] = (*wanted[at][:-1], draw(st.sampled_from(sorted(ODD))))
    return wanted


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(*LOOKS, POSITIONS, st.one_of(st.none(), st.none(), st.sampled_from(sorted(ODD)))),
        max_size=12,
    )
    | all_alike()
)
def test_steps_that_look_alike_are_read_together_as_they_are_one_by_one(wanted):
    check_read_together(wanted)


@pytest.mark.parametrize("at", [0, 1, 2, None])
@pytest.mark.parametrize("odd", sorted(ODD))
def test_odd_steps_are_told_from_those_that_look_alike(odd, at):
    check_read_together([(2, 3, 10**9, 0, odd if at in (number, None) else None) for number in range(3)])


def check_read_together(wanted):
    requests = []
    for number, (time, width, nanoseconds, position, odd) in enumerate(wanted):
        request = pb.StepRequest(
            request_id=str(number),
            session_id=f"s{number}",
            inputs=tensor(np.full((time, width), number, np.float32)),
            position=position,
        )
        if nanoseconds is not None:
            request.timeout.FromNanoseconds(nanoseconds)
        if odd is not None:
            ODD[odd](request)
        requests.append(request)
    alike, others = parse_requests(requests, 100)
    assert sorted(r.request_id for steps in [*alike, None] for r in (steps.requests if steps else others)) == sorted(
        request.request_id for request in requests
    )
    for request in others:
        assert is_refused(request)
    for steps in alike:
        rows = zip(
            *(steps.requests, steps.names, steps.session_ids, steps.positions, steps.inputs, steps.digests), strict=True
        )
        for request, name, session_id, position, inputs, digest in rows:
            call = codec.parse_step(request, "p", 1.0, 100)
            assert (name, session_id) == (request.request_id, call.key.session_id)
            assert (position, digest) == (call.position, call.digest)
            np.testing.assert_array_equal(inputs, call.inputs)
            limit = codec.parse_timeout(request)
            assert (steps.limit is None) == (limit is None)
            assert limit is None or limit <= steps.limit < limit + 0.01 + 1e-9


def test_replies_are_rendered_as_one_by_one():
    requests = [step(request_id=str(n)) for n in range(3)]
    (steps,), _ = parse_requests(requests, 1000)
    replies = [StepReply(n, np.full((1, 2), n, np.float32)) for n in (2, 0)]
    message = pb.StreamStepsResponse()
    for answer in steps.render(Answers(), [2, 0], replies):
        message.MergeFromString(answer.data)
    assert list(message.responses) == [codec.render_reply(requests[reply.position], reply) for reply in replies]
