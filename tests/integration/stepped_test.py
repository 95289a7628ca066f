"""Stepped through a gateway process, in random chunks, interleaved with 31 others: what the whole sequence gives."""

import numpy as np
import pytest

from service.client import SequenceClient
from tests.integration import models

SESSIONS = 32


def sequences(rng):
    return [rng.normal(size=(rng.integers(1, 61), models.INPUT_DIM)).astype(np.float32) for _ in range(SESSIONS)]


def chunks(rng, length):
    """Where a sequence is cut, at random."""
    begin = 0
    while begin < length:
        end = min(length, begin + int(rng.integers(1, 21)))
        yield begin, end
        begin = end


def step_all(client, model, inputs, rng):
    """Outputs of every sequence, stepped in rounds of as many chunks as there are sessions left, in random order."""
    sessions = [client.create_session(model) for _ in inputs]
    waiting = [list(chunks(rng, len(sequence))) for sequence in inputs]
    outputs = [[] for _ in inputs]
    while any(waiting):
        turn = [index for index in rng.permutation(len(inputs)) if waiting[index] and rng.random() < 0.8]
        cuts = [waiting[index].pop(0) for index in turn]
        work = [(sessions[index], inputs[index][begin:end]) for index, (begin, end) in zip(turn, cuts, strict=True)]
        for index, came in zip(turn, client.step_many(work, timeout=120), strict=True):
            outputs[index].append(came)
    for session, sequence in zip(sessions, inputs, strict=True):
        assert session.position == len(sequence)
        session.close()
    return [np.concatenate(parts) for parts in outputs]


def difference(outputs, inputs, whole):
    return max(
        float(np.abs(came - whole(sequence[None])[0]).max()) for came, sequence in zip(outputs, inputs, strict=True)
    )


@pytest.mark.parametrize("kind", models.KINDS)
def test_stepping_gives_what_the_whole_sequence_gives(gateway, wholes, kind):
    rng = np.random.default_rng(11)
    inputs = sequences(rng)
    with SequenceClient(gateway.target) as client:
        outputs = step_all(client, kind, inputs, rng)
    assert difference(outputs, inputs, wholes[kind]) <= wholes[kind].tolerance()


@pytest.mark.parametrize("kind", models.KINDS)
@pytest.mark.parametrize("fault", ["swapped states", "no reset", "skipped slice"])
def test_the_control_a_state_that_went_wrong_shows_a_hundred_times_over(gateway, wholes, kind, fault):
    """What the test above would see if the gateway did it: the comparison is one that can fail."""
    rng = np.random.default_rng(12)
    first, second = (rng.normal(size=(30, models.INPUT_DIM)).astype(np.float32) for _ in range(2))
    whole, half = wholes[kind], 15
    with SequenceClient(gateway.target) as client, client.session(kind) as session:
        if fault == "swapped states":  # the first half of another sequence, then the second of this one
            session.step(second[:half])
        elif fault == "no reset":  # what another sequence left
            session.step(second)
            session.step(first[:half])
        else:
            session.step(first[: half - 5])
        came = session.step(first[half:])
    assert np.abs(came - whole(first[None])[0, half:]).max() > 100 * whole.tolerance()


def test_a_session_s_state_reads_by_name(gateway):
    with SequenceClient(gateway.target) as client, client.session("ntm-dense") as session:
        session.step(np.ones((3, models.INPUT_DIM), np.float32))
        state = session.inspect()
        model = client.model("ntm-dense")
    assert {"memory", "read_weightings", "write_weightings"} <= set(state)
    assert sorted(state["memory"].shape) == [6, 24]
    np.testing.assert_allclose(state["read_weightings"].sum(axis=-1), 1.0, atol=1e-5)
    assert sum(part.size for part in state.values()) == model.versions[0].state_size
