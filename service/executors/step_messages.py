"""The messages of ``step``, written and read as bytes where others like them have gone before.

All requests for batches of one shape are the same but for the bytes of their four arrays, and answers but for the bytes
of their two. What they share is kept, so that a request is put together from parts, and an answer is taken apart after
three comparisons, where protobuf would make and read a dozen messages each. An answer of a form that has not been seen
is read by protobuf, which also has the last word on what is learned from it.
"""

import itertools
import operator
from typing import Any, NamedTuple

import numpy as np

from service.executors.serving_messages import (
    LITTLE_FLOAT,
    MessageError,
    Prediction,
    decode_predict,
    encode_inputs,
    encode_predict,
    float_output,
)
from service.types import StepBatch, StepBatchResult, VersionKey, tuple_of

_SIGNATURE = "step"
_OUTPUTS = ("outputs", "state")
# Of the arrays of a batch, in the order of its messages.
_DTYPES = (LITTLE_FLOAT, np.dtype("<i4"), np.dtype(np.bool_), LITTLE_FLOAT)
# A server writes a map of two in either order. More than a few forms are none that it keeps to.
_MOST_TRIES = 8
# Of batches, for which forms are kept: what a gateway sends has about as many rows and steps from call to call.
_MOST_SHAPES = 256

# Of inputs and of states.
_Shape = tuple[tuple[int, ...], tuple[int, ...]]


class _AnswerForm(NamedTuple):
    """What answers have in common that differ in nothing but the values of their outputs.

    Attributes:
        size: Bytes in all.
        first: Where the values that come first begin, and where they end.
        second: The same of the others.
        head, middle, tail: What stands around them.
        outputs: Where the values of ``outputs`` begin.
        outputs_shape: ``[batch, time, output_dim]``.
        state: Where those of ``state`` begin.
        state_shape: ``[batch, state_size]``.
    """

    size: int
    first: tuple[int, int]
    second: tuple[int, int]
    head: bytes
    middle: bytes
    tail: bytes
    outputs: int
    outputs_shape: tuple[int, ...]
    state: int
    state_shape: tuple[int, ...]

    def fits(self, answer: bytes) -> bool:
        """Whether an answer is one of these: then it can be read here, and means what protobuf would make of it."""
        return (
            len(answer) == self.size
            and answer.startswith(self.head)
            and answer[self.first[1] : self.second[0]] == self.middle
            and answer.endswith(self.tail)
        )

    def read(self, answer: bytes) -> StepBatchResult:
        """Outputs and states, copied: the answer begins anywhere in memory, and cannot be written to."""
        outputs = np.ndarray(self.outputs_shape, LITTLE_FLOAT, answer, self.outputs).astype(np.float32)
        state = np.ndarray(self.state_shape, LITTLE_FLOAT, answer, self.state).astype(np.float32)
        return tuple_of(StepBatchResult, (outputs, state, False, None))


class _Forms:
    """The forms that answers to batches of one shape have come in."""

    def __init__(self) -> None:
        self.forms: list[_AnswerForm] = []
        self._tries = 0

    def learn(self, answer: bytes, result: StepBatchResult) -> None:
        """Keeps the form of an answer that protobuf has read as ``result``; not if it is one too many."""
        if self._tries == _MOST_TRIES:
            return
        self._tries += 1
        form = _form_of(answer, result)
        if form is not None:
            self.forms.append(form)


class StepMessages:
    """Writes requests for one model version, and reads what comes back.

    Args:
        key: The version.
    """

    def __init__(self, key: VersionKey) -> None:
        self._key = key
        self._parts: dict[_Shape, tuple[bytes, ...]] = {}
        self._forms: dict[_Shape, _Forms] = {}
        # The last batch that comes again, the parts of its requests, some of them its arrays' own memory, and the
        # forms of their answers.
        self._kept: tuple[StepBatch | None, tuple[bytes | memoryview, ...], _Forms] = (None, (), _Forms())

    def request(self, batch: StepBatch) -> bytes:
        """A serialized ``PredictRequest`` (tensorflow_serving/apis/predict.proto) that runs ``step`` on a batch."""
        kept, pieces, _ = self._kept
        if kept is batch:
            return b"".join(pieces)
        shape = (batch.inputs.shape, batch.state.shape)
        parts = self._parts.get(shape)
        if parts is None:
            _make_room(self._parts)
            parts = self._parts[shape] = _request_parts(self._key, batch)
        given = (batch.inputs, batch.lengths, batch.reset, batch.state)
        arrays = [np.ascontiguousarray(array, dtype) for array, dtype in zip(given, _DTYPES, strict=True)]
        pieces = tuple(itertools.chain(*zip(parts, (array.data for array in arrays), strict=True)))
        if batch.again and all(map(operator.is_, arrays, given)):
            self._kept = batch, pieces, self._forms_of(shape)
        return b"".join(pieces)

    def result(self, answer: bytes, batch: StepBatch) -> StepBatchResult:
        """What a serialized ``PredictResponse`` says of a batch; its arrays are the caller's own.

        Raises:
            MessageError: it is not an answer to such a request.
        """
        kept, _, known = self._kept
        if kept is not batch:
            known = self._forms_of((batch.inputs.shape, batch.state.shape))
        for form in known.forms:
            if form.fits(answer):
                return form.read(answer)
        result = self._parse(answer, batch)
        known.learn(answer, result)
        return result

    def _forms_of(self, shape: _Shape) -> _Forms:
        known = self._forms.get(shape)
        if known is None:
            _make_room(self._forms)
            known = self._forms[shape] = _Forms()
        return known

    def _parse(self, answer: bytes, batch: StepBatch) -> StepBatchResult:
        prediction = decode_predict(answer)
        if prediction.key != self._key:
            raise MessageError(f"it comes from {prediction.key}")
        rows, steps, _ = batch.inputs.shape
        return _result_of(prediction, (rows, steps, None), batch.state.shape)


def _result_of(
    prediction: Prediction, outputs_shape: tuple[int | None, ...], state_shape: tuple[int | None, ...]
) -> StepBatchResult:
    return StepBatchResult(
        outputs=float_output(prediction, "outputs", outputs_shape), state=float_output(prediction, "state", state_shape)
    )


def _request_parts(key: VersionKey, batch: StepBatch) -> tuple[bytes, ...]:
    """What comes before the bytes of each array of a request."""
    inputs = {"inputs": batch.inputs, "lengths": batch.lengths, "reset": batch.reset, "state": batch.state}
    before = encode_predict(key, _SIGNATURE, {}, _OUTPUTS)
    parts = []
    for name, array in inputs.items():
        alone = encode_inputs({name: array})
        parts.append(before + alone[: len(alone) - array.nbytes])
        before = b""
    return tuple(parts)


def _form_of(answer: bytes, result: StepBatchResult) -> _AnswerForm | None:
    """The form of an answer that protobuf has read as ``result``; None where it cannot be told.

    Where the values stand is guessed, and then made sure of: with other bytes there, protobuf has to read just these.
    """
    outputs, state = _bytes_of(result)
    if not (outputs and state):
        return None
    # The same bytes may stand in it twice: the outputs of one time step may be the state.
    places = [{answer.find(content), answer.rfind(content)} for content in (outputs, state)]
    for at in itertools.product(*places):
        form = _form_with(answer, result, *at) if min(at) >= 0 else None
        if form is not None:
            return form
    return None


def _form_with(answer: bytes, result: StepBatchResult, outputs_at: int, state_at: int) -> _AnswerForm | None:
    """The form of an answer whose values stand at these places; None where they do not."""
    outputs, state = _bytes_of(result)
    first, second = sorted([(outputs_at, outputs_at + len(outputs)), (state_at, state_at + len(state))])
    if first[1] > second[0]:
        return None
    altered = bytearray(answer)
    # Where the two are the same, what is put in their places is not: else they could be taken for each other.
    other = _altered(outputs, 1), _altered(state, 2)
    altered[outputs_at : outputs_at + len(outputs)], altered[state_at : state_at + len(state)] = other
    try:
        came = _result_of(decode_predict(bytes(altered)), result.outputs.shape, result.state.shape)
    except MessageError:
        return None
    if _bytes_of(came) != other:
        return None
    return _AnswerForm(
        size=len(answer),
        first=first,
        second=second,
        head=answer[: first[0]],
        middle=answer[first[1] : second[0]],
        tail=answer[second[1] :],
        outputs=outputs_at,
        outputs_shape=result.outputs.shape,
        state=state_at,
        state_shape=result.state.shape,
    )


def _bytes_of(result: StepBatchResult) -> tuple[bytes, bytes]:
    return result.outputs.astype(LITTLE_FLOAT).tobytes(), result.state.astype(LITTLE_FLOAT).tobytes()


def _altered(content: bytes, seed: int) -> bytes:
    """As many bytes, each another one."""
    change = np.random.default_rng(seed).integers(1, 256, len(content), np.uint8)
    return bytes((np.frombuffer(content, np.uint8) ^ change).tobytes())


def _make_room(kept: dict[_Shape, Any]) -> None:
    if len(kept) >= _MOST_SHAPES:
        kept.clear()
