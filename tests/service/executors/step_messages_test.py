"""Requests and answers of ``step`` written and read as bytes, against what protobuf makes of them."""

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.executors import step_messages
from service.executors.serving_messages import MessageError, decode_predict, encode_predict, float_output
from service.executors.serving_protos import predict_pb2
from service.executors.step_messages import StepMessages
from service.types import FloatArray, StepBatch, StepBatchResult, VersionKey, empty_batch
from tests.service.executors.fake_model_server import reply
from tests.service.executors.sequence_models import WIDTH, random_batch
from tests.service.executors.tf_serving import ONE, TWO

Write = Callable[[FloatArray, FloatArray], bytes]
SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4))


def typed(outputs: FloatArray, state: FloatArray, key: VersionKey = ONE) -> bytes:
    """As TensorFlow Serving answers: typed fields, here bit by bit, which a Python float would not keep of a NaN."""
    response = _without_values(outputs, state)
    for name, array in (("outputs", outputs), ("state", state)):
        content = predict_pb2.PredictResponse()
        content.outputs[name].tensor_content = array.tobytes()
        packed = bytearray(content.outputs[name].SerializeToString())
        packed[0] = 5 << 3 | 2  # float_val in place of tensor_content
        response.outputs[name].MergeFromString(bytes(packed))
    return _named(response, key)


def as_content(outputs: FloatArray, state: FloatArray, key: VersionKey = ONE) -> bytes:
    """As it does with --enable_serialization_as_tensor_content."""
    response = _without_values(outputs, state)
    for name, array in (("outputs", outputs), ("state", state)):
        response.outputs[name].tensor_content = array.tobytes()
    return _named(response, key)


def the_other_way_round(write: Write) -> Write:
    """The same answer with its outputs in the other order: maps have none."""

    def written(outputs: FloatArray, state: FloatArray) -> bytes:
        whole = predict_pb2.PredictResponse.FromString(write(outputs, state))
        alone = {}
        for name in ("outputs", "state"):
            alone[name] = predict_pb2.PredictResponse()
            alone[name].outputs[name].CopyFrom(whole.outputs[name])
        parts = [part.SerializeToString() for part in alone.values()]
        whole.ClearField("outputs")
        answer = write(outputs, state)
        return b"".join([*(parts if answer.startswith(parts[1]) else parts[::-1]), whole.SerializeToString()])

    return written


FORMS: list[Write] = [typed, as_content, the_other_way_round(typed), the_other_way_round(as_content)]


def _without_values(outputs: FloatArray, state: FloatArray) -> Any:
    response = reply(predict_pb2.PredictRequest(), outputs=outputs[:0], state=state[:0])
    for name, array in (("outputs", outputs), ("state", state)):
        response.outputs[name].tensor_shape.dim[0].size = len(array)
    return response


def _named(response: Any, key: VersionKey) -> bytes:
    response.model_spec.name, response.model_spec.version.value = key
    response.model_spec.signature_name = "step"
    return bytes(response.SerializeToString())


def values(batch: StepBatch, seed: int = 0) -> StepBatchResult:
    """Any bytes: NaNs of all kinds among them."""
    random = np.random.default_rng(seed)
    rows, steps, width = batch.inputs.shape
    outputs = random.integers(0, 2**32, (rows, steps, width), np.uint32).view(np.float32)
    return StepBatchResult(outputs, random.integers(0, 2**32, batch.state.shape, np.uint32).view(np.float32))


def same(one: StepBatchResult, other: StepBatchResult) -> bool:
    pairs = ((one.outputs, other.outputs), (one.state, other.state))
    return all(a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in pairs)


def outcome(messages: StepMessages, answer: bytes, batch: StepBatch) -> StepBatchResult | str:
    try:
        return messages.result(answer, batch)
    except MessageError as error:
        return str(error)


@pytest.fixture
def no_protobuf(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, protobuf parses nothing."""

    def parse(answer: bytes) -> None:
        raise AssertionError("protobuf was asked")

    return lambda: monkeypatch.setattr(step_messages, "decode_predict", parse)


@settings(deadline=None)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=6), seed=st.integers(0, 99))
def test_requests_say_what_protobuf_would_write(shapes: list[tuple[int, int]], seed: int) -> None:
    messages = StepMessages(TWO)
    for at, shape in enumerate(shapes):
        batch = random_batch(*shape, seed=seed + at)
        batch = batch._replace(state=batch.state[::-1], inputs=np.asfortranarray(batch.inputs))
        inputs = {"inputs": batch.inputs, "lengths": batch.lengths, "reset": batch.reset, "state": batch.state}
        expected = predict_pb2.PredictRequest.FromString(encode_predict(TWO, "step", inputs, ("outputs", "state")))
        assert predict_pb2.PredictRequest.FromString(messages.request(batch)) == expected


def test_requests_for_batches_of_another_width_are_others() -> None:
    messages = StepMessages(ONE)
    for width in (3, 5, 3):
        batch = random_batch(2, 2, width=width)
        request = predict_pb2.PredictRequest.FromString(messages.request(batch))
        assert [dim.size for dim in request.inputs["state"].tensor_shape.dim] == [2, width]
        assert request.inputs["state"].tensor_content == batch.state.tobytes()


@settings(deadline=None)
@given(order=st.lists(st.integers(0, 2), min_size=1, max_size=8), fortran=st.booleans())
def test_a_batch_that_comes_again_is_read_again(order: list[int], fortran: bool) -> None:
    messages = StepMessages(TWO)
    batches = [empty_batch(1, steps, WIDTH, WIDTH, again=True) for steps in (2, 2, 3)]
    if fortran:  # of which no request can be put together as it lies
        batches[2] = batches[2]._replace(inputs=np.asfortranarray(np.zeros((1, 3, WIDTH), np.float32)))
    for seed, at in enumerate(order):
        values_of, batch = random_batch(*batches[at].inputs.shape[:2], seed=seed), batches[at]
        for field in ("inputs", "lengths", "reset", "state"):
            getattr(batch, field)[...] = getattr(values_of, field)
        assert messages.request(batch) == StepMessages(TWO).request(values_of)
        expected = values(batch, seed)
        assert same(messages.result(typed(expected.outputs, expected.state, TWO), batch), expected)


def test_any_other_batch_is_let_go_of() -> None:
    messages, batch = StepMessages(TWO), random_batch(2, 1)
    state = weakref.ref(batch.state)
    messages.request(batch)
    del batch
    assert state() is None


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (64, 16)])
def test_an_answer_like_one_before_is_read_without_protobuf(
    write: Write, shape: tuple[int, int], no_protobuf: Callable[[], None]
) -> None:
    messages, batch = StepMessages(ONE), random_batch(*shape)
    for seed in range(2):
        expected = values(batch, seed)
        came = messages.result(write(expected.outputs, expected.state), batch)
        assert same(came, expected)
        assert came.outputs.flags.writeable
        assert came.state.flags.writeable
        no_protobuf()


@pytest.mark.parametrize("write", FORMS)
def test_outputs_that_are_the_state_too_are_told_from_it(write: Write, no_protobuf: Callable[[], None]) -> None:
    messages, batch = StepMessages(ONE), random_batch(1, 1)
    state = values(batch).state
    assert same(messages.result(write(state[None], state), batch), StepBatchResult(state[None], state))
    no_protobuf()
    expected = values(batch, 1)
    assert same(messages.result(write(expected.outputs, expected.state), batch), expected)


@settings(deadline=None)
@given(order=st.lists(st.tuples(st.sampled_from(FORMS), SHAPES, st.booleans()), min_size=1, max_size=20))
def test_forms_and_shapes_may_come_in_any_order(order: list[tuple[Write, tuple[int, int], bool]]) -> None:
    messages = StepMessages(ONE)
    for seed, (write, shape, zeros) in enumerate(order):
        batch = random_batch(*shape)
        expected = values(batch, seed)
        if zeros:  # whose bytes stand everywhere
            expected = StepBatchResult(np.zeros_like(expected.outputs), np.zeros_like(expected.state))
        assert same(messages.result(write(expected.outputs, expected.state), batch), expected)


@settings(deadline=None)
@given(data=st.data(), write=st.sampled_from(FORMS))
def test_a_broken_answer_is_what_it_would_be_without_those_before(data: st.DataObject, write: Write) -> None:
    messages, batch = StepMessages(ONE), random_batch(2, 1)
    learned = values(batch)
    answer = write(learned.outputs, learned.state)
    messages.result(answer, batch)
    broken = bytearray(answer)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(broken) - 1))
        change = data.draw(st.sampled_from(["set", "cut", "add"]))
        broken[at : at + (change != "add")] = b"" if change == "cut" else bytes([data.draw(st.integers(0, 255))])
    came, expected = outcome(messages, bytes(broken), batch), outcome(StepMessages(ONE), bytes(broken), batch)
    if isinstance(came, StepBatchResult) and isinstance(expected, StepBatchResult):
        assert same(came, expected)
    else:
        assert came == expected


def test_an_answer_of_another_version_is_none_however_many_came_before() -> None:
    messages, batch = StepMessages(ONE), random_batch(1, 1)
    result = values(batch)
    messages.result(typed(result.outputs, result.state), batch)
    with pytest.raises(MessageError, match="it comes from sums/2"):
        messages.result(typed(result.outputs, result.state, TWO), batch)


def test_an_answer_to_a_batch_of_another_shape_is_none() -> None:
    messages, batch = StepMessages(ONE), random_batch(2, 1)
    result = values(batch)
    answer = typed(result.outputs, result.state)
    messages.result(answer, batch)
    with pytest.raises(MessageError, match="shape"):
        messages.result(answer, random_batch(1, 2))


def test_a_server_that_never_answers_alike_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    messages, batch = StepMessages(ONE), random_batch(1, 1)
    learned: list[bytes] = []
    form_of = step_messages._form_of

    def count(answer: bytes, result: StepBatchResult) -> Any:
        learned.append(answer)
        return form_of(answer, result)

    monkeypatch.setattr(step_messages, "_form_of", count)
    for seed in range(50):
        response = predict_pb2.PredictResponse.FromString(typed(*values(batch, seed)[:2]))
        response.model_spec.signature_name = f"step {seed}"
        assert same(messages.result(response.SerializeToString(), batch), values(batch, seed))
    assert 1 <= len(learned) < 20  # what cannot be learned is not tried for ever


def test_what_is_kept_of_shapes_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_messages, "_MOST_SHAPES", 3)
    messages = StepMessages(ONE)
    for steps in (1, 2, 3, 4, 5, 1, 4):
        batch = random_batch(1, steps)
        expected = values(batch, steps)
        assert predict_pb2.PredictRequest.FromString(messages.request(batch)).inputs["state"].tensor_content
        assert same(messages.result(typed(expected.outputs, expected.state), batch), expected)
        assert len(messages._parts) <= 3
        assert len(messages._forms) <= 3


def test_models_of_any_width_are_read_as_they_describe_themselves() -> None:
    """The width of the outputs is the model's: an answer of another is read as such, and refused by the batcher."""
    messages, batch = StepMessages(ONE), random_batch(1, 2)
    for width in (WIDTH, 7, WIDTH):
        outputs = np.arange(2 * width, dtype=np.float32).reshape(1, 2, width)
        answer = typed(outputs, batch.state)
        came = messages.result(answer, batch)
        assert came.outputs.shape == (1, 2, width)
        np.testing.assert_array_equal(float_output(decode_predict(answer), "outputs", (1, 2, None)), came.outputs)
