"""Responses as bytes, out of messages that are filled in anew: what they say does not depend on what they said."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service import codec
from service.answers import Answers
from service.sessions.cohort import Replies
from service.step_stream import answer_of
from service.types import StepReply

NAMES = st.text(max_size=8)
POSITIONS = st.integers(0, 2**63 - 1)


def outputs(draw, *rows):
    shape = (*rows, draw(st.integers(1, 4)), draw(st.integers(0, 3)))
    return draw(arrays(np.float32, shape, elements=st.floats(width=32)))


@st.composite
def singles(draw):
    """A request's ids and its reply."""
    return draw(NAMES), draw(NAMES), StepReply(draw(POSITIONS), outputs(draw))


@st.composite
def blocks(draw):
    """Request ids, and the replies of steps that came as columns."""
    names = draw(st.lists(NAMES, min_size=1, max_size=5))
    positions = draw(st.lists(POSITIONS, min_size=len(names), max_size=len(names)))
    return names, Replies(positions, outputs(draw, len(names)))


@st.composite
def several(draw):
    """Request ids, session ids, and the replies of steps that came as requests."""
    names, replies = draw(blocks())
    return names, draw(st.lists(NAMES, min_size=len(names), max_size=len(names))), replies


def made_anew(told):
    """The message that says one of these."""
    if len(told) == 3:
        *ids, replies = told
        if isinstance(replies, StepReply):
            ids, replies = [[name] for name in ids], [replies]
        requests = [pb.StepRequest(request_id=one, session_id=other) for one, other in zip(*ids, strict=True)]
        return pb.StreamStepsResponse(
            responses=[codec.render_reply(request, reply) for request, reply in zip(requests, replies, strict=True)]
        )
    names, replies = told
    tensor = tensor_pb2.Tensor(dtype=1, shape=replies.outputs.shape, content=replies.outputs.astype("<f4").tobytes())
    return pb.StreamStepsResponse(
        columns=[pb.StepResultColumns(request_ids=names, positions=replies.positions, outputs=tensor)]
    )


@given(st.lists(singles() | blocks() | several(), max_size=12), st.integers(1, 2000))
def test_what_is_filled_in_anew_says_what_a_new_message_would(told, written):
    answers = Answers(written)
    whole, parts = pb.StreamStepsResponse(), []
    for one in told:
        if isinstance(one[-1], StepReply):
            parts.append(answers.of(*one))
        elif len(one) == 3:
            answer = answers.of_requests(*one)
            assert answer.steps == len(one[0])
            parts.append(answer.data)
        else:
            answer = answers.of_columns(*one)
            assert answer.steps == len(one[0])
            parts.append(answer.data)
        assert pb.StreamStepsResponse.FromString(parts[-1]) == made_anew(one)
        whole.MergeFrom(made_anew(one))
    assert pb.StreamStepsResponse.FromString(b"".join(parts)) == whole


def test_responses_of_as_many_steps_have_the_shape_of_their_own_outputs():
    answers = Answers()
    for count, shape in ((3, (2, 2)), (3, (1, 4)), (2, (1, 4)), (3, (2, 2)), (3, (4, 1))):
        names = [str(number) for number in range(count)]
        replies = Replies(range(count), np.random.default_rng(0).random((count, *shape), np.float32))
        data = answers.of_requests(names, names, replies).data
        assert pb.StreamStepsResponse.FromString(data) == made_anew((names, names, replies))


def test_what_was_written_into_a_message_is_let_go_now_and_then():
    answers, replies = Answers(10_000), Replies([1, 2], np.zeros((2, 1, 250), np.float32))
    ways = {
        "_single": lambda: answers.of("a", "s", replies[0]),
        "_several": lambda: answers.of_requests("ab", "st", replies),
        "_columns": lambda: answers.of_columns("ab", replies),
    }
    for name, tell in ways.items():
        messages = []
        for _ in range(40):
            tell()
            messages.append(getattr(answers, name))
        kept = len({id(message) for message in messages})
        assert 4 <= kept <= 10, name


def test_refusals_are_told_one_by_one():
    responses = [pb.StepResponse(request_id=name) for name in "abc"]
    answer = answer_of(*responses)
    assert answer.steps == 3
    assert list(pb.StreamStepsResponse.FromString(answer.data).responses) == responses
