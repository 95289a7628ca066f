"""What both clients do, against a real gateway on a real socket."""

import threading

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from service.client import GatewayError, ModelNotFound, PositionMismatch, PrecedingStepFailed, SessionNotFound
from service.types import StepBatchResult
from tests.service.support import random_inputs, run_whole


def refused(call, *args, **kwargs):
    with pytest.raises(grpc.RpcError) as caught:
        call(*args, **kwargs)
    assert isinstance(caught.value, GatewayError)
    return caught.value


def test_numpy_goes_in_and_numpy_comes_out(client):
    session = client.session("sums")
    inputs = random_inputs(7)
    first, second = session.step(inputs[:3], timeout=5), session.step(inputs[3:])
    assert first.dtype == np.float32
    np.testing.assert_array_equal(np.concatenate([first, second]), run_whole(inputs)[0])
    assert session.position == 7
    assert len(session.session_id) >= 22


def test_the_state_can_be_looked_into(client):
    session = client.session("sums")
    inputs = random_inputs(4)
    session.step(inputs)
    state = session.inspect()
    expected = run_whole(inputs)[1]
    np.testing.assert_array_equal(state["average"], expected[:2])
    np.testing.assert_array_equal(state["counters"], expected[None, 3:])
    assert {name: value.shape for name, value in state.items()} == {
        part.name: part.shape for part in client.model("sums").versions[0].state_layout
    }


def test_models_tell_what_they_take(client):
    (model,) = client.models()
    (version,) = model.versions
    assert (model.name, version.version, version.state) == ("sums", 1, "AVAILABLE")
    assert (version.input_dim, version.output_dim, version.state_size) == (2, 3, 5)
    assert client.model("sums") == model
    assert isinstance(refused(client.model, "nobody"), ModelNotFound)


def test_a_session_tells_about_itself(client):
    session = client.session("sums", session_id="mine", ttl=100)
    session.step(random_inputs(2))
    info = session.info()
    assert (info.session_id, info.model, info.version, info.position) == ("mine", "sums", 1, 2)
    assert (info.expires - info.last_used).total_seconds() == pytest.approx(100, abs=0.01)
    assert info.created <= info.last_used


def test_opening_the_same_session_again_finds_it_where_it_stands(client):
    session = client.session("sums", session_id="mine")
    session.step(random_inputs(2))
    assert client.session("sums", session_id="mine").position == 2
    assert refused(client.session, "sums", session_id="mine", ttl=5).reason == "SESSION_EXISTS"


@pytest.mark.parametrize("told", [True, False])
def test_another_client_goes_on_with_a_session(connect, gateway, told):
    first, second = connect(gateway.target), connect(gateway.target)
    inputs = random_inputs(6)
    session = first.session("sums")
    outputs = [session.step(inputs[:4])]
    attached = second.attach(session.session_id, position=session.position if told else None)
    assert attached.position == 4
    outputs.append(attached.step(inputs[4:]))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])


def test_attaching_to_nothing_is_an_error(client):
    assert isinstance(refused(client.attach, "nobody"), SessionNotFound)
    with pytest.raises(ValueError, match="position is -1"):
        client.attach("nobody", position=-1)


def test_somebody_elses_step_is_noticed_and_the_position_is_never_taken_over(connect, gateway):
    client = connect(gateway.target)
    session = client.session("sums")
    session.step(random_inputs(2))
    client.attach(session.session_id).step(random_inputs(3, seed=1))
    error = refused(session.step, random_inputs(1, seed=2))
    assert isinstance(error, PositionMismatch)
    assert (error.position, error.last_begin) == (5, 2)
    assert session.position == 2
    assert isinstance(refused(session.step, random_inputs(1, seed=2)), PositionMismatch)
    assert client.attach(session.session_id, position=error.position).step(random_inputs(1)).shape == (1, 3)


def test_a_fork_and_a_snapshot_go_on_from_where_their_session_stood(client):
    inputs = random_inputs(6)
    session = client.session("sums")
    session.step(inputs[:3])
    fork, blob = session.fork(), session.snapshot()
    session.step(random_inputs(2, seed=1))
    restored = client.restore(blob)
    assert len({session.session_id, fork.session_id, restored.session_id}) == 3
    for copy in (fork, restored):
        assert copy.position == 3
        np.testing.assert_array_equal(copy.step(inputs[3:]), run_whole(inputs)[0][3:])
    assert refused(client.restore, blob[:-1] + b"!").code() is grpc.StatusCode.INVALID_ARGUMENT


def test_sessions_are_listed_page_by_page(client):
    opened = {client.session("sums").session_id for _ in range(7)}
    listed = client.sessions(page_size=3)
    assert {info.session_id for info in listed} == opened
    assert len(listed) == 7
    assert {info.position for info in listed} == {0}


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        (np.zeros((0, 2)), "INVALID_TENSOR"),
        (np.zeros(2), "INVALID_TENSOR"),
        (np.float32(1), "INVALID_TENSOR"),
        (np.zeros((1, 5)), "INVALID_TENSOR"),
        (np.full((1, 2), np.nan), "INVALID_TENSOR"),
        (np.full((1, 2), np.inf), "INVALID_TENSOR"),
        (np.zeros((600_000, 2)), "MESSAGE_TOO_LARGE"),  # more than a chunk may have
        (np.zeros((3_000_000, 2)), "MESSAGE_TOO_LARGE"),  # more than a message may have
    ],
)
def test_bad_inputs_are_refused_and_the_session_goes_on(client, inputs, reason):
    session = client.session("sums")
    good = random_inputs(5)
    outputs = [session.step(good[:2])]
    error = refused(session.step, inputs)
    assert error.reason == reason
    assert not error.outcome_unknown
    outputs.append(session.step(good[2:]))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(good)[0])


def test_other_refusals_have_their_reason(client):
    assert refused(client.session, "nobody").reason == "MODEL_NOT_FOUND"
    assert refused(client.session, "sums", version=9).metadata["version"] == "9"
    error = refused(client.session, "sums", session_id="no spaces")
    assert (error.reason, error.field_violations[0].field) == ("INVALID_ID", "session_id")
    assert refused(client.session, "sums", ttl=1e9).reason == "INVALID_ARGUMENT"
    gone = client.session("sums")
    client.attach(gone.session_id).close()
    assert isinstance(refused(gone.step, random_inputs(1)), SessionNotFound)
    with pytest.raises(ValueError, match="timeout is 0"):
        client.session("sums").step(random_inputs(1), timeout=0)
    with pytest.raises(TypeError, match="expected real numbers"):
        client.session("sums").step([["a"]])


def test_a_model_that_answers_nonsense_is_an_error_and_nothing_is_lost(client, gateway):
    session = client.session("sums")

    def nan(batch):
        gateway.executor.fault = None
        result = np.full((*batch.inputs.shape[:2], 3), np.nan, np.float32)
        return StepBatchResult(result, batch.state)

    gateway.executor.fault = nan
    error = refused(session.step, random_inputs(2))
    assert (error.code(), error.reason) == (grpc.StatusCode.INTERNAL, "BAD_MODEL_OUTPUT")
    np.testing.assert_array_equal(session.step(random_inputs(2)), run_whole(random_inputs(2))[0])


def test_many_sessions_are_stepped_at_once(client):
    sessions = [client.session("sums") for _ in range(40)]
    inputs = [random_inputs(3, seed=n) for n in range(40)]
    for begin, end in ((0, 1), (1, 3)):
        outputs = client.step_many([(s, x[begin:end]) for s, x in zip(sessions, inputs, strict=True)])
        for x, y in zip(inputs, outputs, strict=True):
            np.testing.assert_array_equal(y, run_whole(x)[0][begin:end])
    assert client.step_many([]) == []


def test_step_many_returns_or_raises_what_went_wrong(client):
    good, bad = client.session("sums"), client.session("sums")
    steps = [(good, random_inputs(1)), (bad, np.zeros((1, 9))), (bad, random_inputs(1))]
    outputs = client.step_many(steps, return_exceptions=True)
    assert outputs[0].shape == (1, 3)
    assert outputs[1].reason == "INVALID_TENSOR"
    assert isinstance(outputs[2], PrecedingStepFailed)
    assert refused(client.step_many, steps[1:]).reason == "INVALID_TENSOR"
    assert (good.position, bad.position) == (1, 0)


@pytest.mark.parametrize("count", [1, 3])
def test_whoever_was_told_of_a_failure_by_step_many_goes_on(client, count):
    sessions = [client.session("sums") for _ in range(count)]
    wrong, right = np.zeros((1, 7)), random_inputs(2)
    for _ in range(2):
        came = client.step_many([(session, wrong) for session in sessions], return_exceptions=True)
        assert [error.reason for error in came] == ["INVALID_TENSOR"] * count
    for session in sessions:  # they know, and ask for another step
        np.testing.assert_array_equal(session.step(right), run_whole(right)[0])
    assert refused(client.step_many, [(session, wrong) for session in sessions]).reason == "INVALID_TENSOR"
    for session in sessions:  # also of those that came after the one that was raised
        assert session.step(right).shape == (2, 3)


def test_one_session_several_times_in_step_many_runs_in_order(client):
    session = client.session("sums")
    inputs = random_inputs(6)
    outputs = client.step_many([(session, inputs[n : n + 2]) for n in (0, 2, 4)])
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])


def test_a_session_of_another_client_is_not_stepped(connect, gateway):
    session = connect(gateway.target).session("sums")
    with pytest.raises(ValueError, match="belongs to another client"):
        connect(gateway.target).step_many([(session, random_inputs(1))])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_chunks_in_any_order_give_the_whole(client, data):
    lengths = data.draw(st.lists(st.integers(1, 30), min_size=1, max_size=8))
    inputs = [random_inputs(length, seed=n) for n, length in enumerate(lengths)]
    sessions = [client.session("sums") for _ in lengths]
    outputs = [[] for _ in lengths]
    left = [list(x) for x in inputs]
    while any(left):
        chosen = data.draw(
            st.lists(st.sampled_from([n for n, rest in enumerate(left) if rest]), min_size=1, unique=True)
        )
        chunks = [left[n][: data.draw(st.integers(1, len(left[n])))] for n in chosen]
        results = client.step_many([(sessions[n], np.array(chunk)) for n, chunk in zip(chosen, chunks, strict=True)])
        for n, chunk, result in zip(chosen, chunks, results, strict=True):
            outputs[n].append(result)
            del left[n][: len(chunk)]
    for x, y in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(np.concatenate(y), run_whole(x)[0])


def test_steps_asked_for_ahead_run_in_order(client):
    session = client.session("sums")
    inputs = random_inputs(20)
    futures = [session.start(inputs[n : n + 2]) for n in range(0, 20, 2)]
    outputs = [future.result(20) for future in futures]
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])


def test_a_large_chunk_goes_through_beside_small_ones(connect, gateway):
    client = connect(gateway.target, max_message_bytes=2000)
    sessions = [client.session("sums") for _ in range(5)]
    inputs = [random_inputs(length, seed=length) for length in (1, 600, 2, 900, 3)]  # 8 bytes a time step
    outputs = client.step_many(list(zip(sessions, inputs, strict=True)))
    for x, y in zip(inputs, outputs, strict=True):
        np.testing.assert_array_equal(y, run_whole(x)[0])
    assert refused(sessions[0].step, np.zeros((600, 9))).reason == "INVALID_TENSOR"


def test_a_deadline_is_kept_and_the_same_step_again_is_safe(client, gateway):
    session = client.session("sums")
    inputs = random_inputs(4)
    session.step(inputs[:2])
    gateway.hold()
    error = refused(session.step, inputs[2:], timeout=0.2)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert error.outcome_unknown
    assert session.position == 2
    gateway.release()
    np.testing.assert_array_equal(session.step(inputs[2:]), run_whole(inputs)[0][2:])
    assert gateway.position(session) == 4


def test_a_deadline_of_one_step_is_not_anothers(client, gateway):
    patient, hasty = client.session("sums"), client.session("sums")
    gateway.hold()
    waiting = patient.start(random_inputs(1), timeout=20)
    assert refused(hasty.step, random_inputs(1), timeout=0.2).code() is grpc.StatusCode.DEADLINE_EXCEEDED
    gateway.release()
    assert waiting.result(20).shape == (1, 3)


def test_closing_a_session_fails_its_steps_and_deletes_it(client, gateway):
    session = client.session("sums")
    gateway.hold()
    futures = [session.start(random_inputs(1)) for _ in range(3)]
    gateway.eventually(lambda: gateway.executor.batches)
    session.close()
    for future in futures:
        assert refused(future.result, 20).code() in {grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED}
    gateway.release()
    assert refused(session.step, random_inputs(1)).reason == "CLOSED"
    assert isinstance(refused(client.attach, session.session_id), SessionNotFound)
    session.close()


def test_closing_the_client_fails_what_waits_and_leaves_the_sessions(connect, gateway):
    client = connect(gateway.target)
    session = client.session("sums")
    session.step(random_inputs(1))
    gateway.hold()
    future = session.start(random_inputs(1))
    gateway.eventually(lambda: len(gateway.executor.batches) == 2)
    client.close()
    assert refused(future.result, 20).reason == "CLOSED"
    gateway.release()
    assert refused(session.step, random_inputs(1)).reason == "CLOSED"
    assert refused(session.info).reason == "CLOSED"
    client.close()
    assert connect(gateway.target).attach(session.session_id).session_id == session.session_id


def test_no_thread_outlives_its_client(connect, gateway):
    before = set(threading.enumerate())
    client = connect(gateway.target)
    client.session("sums").step(random_inputs(1))
    client.close()
    gateway.eventually(lambda: not {t for t in set(threading.enumerate()) - before if t.name.startswith("ntm-client")})
