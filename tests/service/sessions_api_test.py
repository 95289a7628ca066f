"""Lists, forks, snapshots and restores, over a real socket."""

import base64

import grpc
import numpy as np
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from tests.service.refusals import refused
from tests.service.support import (
    NumpyExecutor,
    outputs_of,
    random_inputs,
    run_whole,
    running_gateway,
    step_request,
    version_of,
)


async def test_sessions_are_listed_in_pages():
    async with running_gateway() as running:
        names = [f"s{number:02}" for number in range(7)]
        for name in names:
            await running.create(name)
        await running.stub.Step(step_request("s03", random_inputs(5), 0))
        listed, token, pages = [], "", 0
        while True:
            page = await running.stub.ListSessions(pb.ListSessionsRequest(page_size=3, page_token=token))
            listed += page.sessions
            pages += 1
            token = page.next_page_token
            if not token:
                break
        assert ([s.session_id for s in listed], pages) == (names, 3)
        assert listed[3] == await running.stub.GetSession(pb.GetSessionRequest(session_id="s03"))
        assert listed[3].position == 5


async def test_a_page_token_that_was_changed_is_refused():
    async with running_gateway() as running:
        for name in "abc":
            await running.create(name)
        token = (await running.stub.ListSessions(pb.ListSessionsRequest(page_size=1))).next_page_token
        raw = bytearray(base64.urlsafe_b64decode(token))
        raw[-1] ^= 1
        for bad in (base64.urlsafe_b64encode(raw).decode(), "x", "YQ==", "AAAA" + token):
            code, reason, _ = await refused(running.stub.ListSessions(pb.ListSessionsRequest(page_token=bad)))
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        for size in (-1, 1001):
            code, _, _ = await refused(running.stub.ListSessions(pb.ListSessionsRequest(page_size=size)))
            assert code == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_fork_goes_its_own_way_from_the_same_place():
    async with running_gateway() as running:
        await running.create("s")
        inputs, other = random_inputs(8), random_inputs(4, seed=9)
        await running.stub.Step(step_request("s", inputs[:4], 0))
        request = pb.ForkSessionRequest(session_id="s", fork_session_id="f")
        fork = await running.stub.ForkSession(request)
        assert (fork.session_id, fork.position, fork.model.version) == ("f", 4, 1)
        code, reason, _ = await refused(running.stub.Step(step_request("f", inputs[:4], 0)))
        assert (code, reason) == (grpc.StatusCode.ABORTED, "POSITION_MISMATCH")  # nothing to replay
        mine = await running.stub.Step(step_request("s", inputs[4:], 4))
        its = await running.stub.Step(step_request("f", other, 4))
        np.testing.assert_array_equal(outputs_of(mine), run_whole(inputs)[0][4:])
        np.testing.assert_array_equal(outputs_of(its), run_whole(np.concatenate([inputs[:4], other]))[0][4:])
        assert (await running.stub.ForkSession(request)).position == 8  # sent again: the one that is there
        code, reason, _ = await refused(
            running.stub.ForkSession(pb.ForkSessionRequest(session_id="f", fork_session_id="s"))
        )
        assert (code, reason) == (grpc.StatusCode.ALREADY_EXISTS, "SESSION_EXISTS")
        code, reason, _ = await refused(
            running.stub.ForkSession(pb.ForkSessionRequest(session_id="nobody", fork_session_id="g"))
        )
        assert (code, reason) == (grpc.StatusCode.NOT_FOUND, "SESSION_NOT_FOUND")


async def snapshot_of(running, session_id):
    reply = await running.stub.SnapshotSession(pb.SnapshotSessionRequest(session_id=session_id))
    return reply.snapshot, reply.session.position


@pytest.mark.parametrize("steps", [0, 5])
async def test_a_snapshot_is_restored_on_another_gateway_with_the_same_secret(steps, tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    inputs = random_inputs(9)
    async with running_gateway(secret_file=secret) as running:
        await running.create("s")
        if steps:
            await running.stub.Step(step_request("s", inputs[:steps], 0))
        blob, position = await snapshot_of(running, "s")
        assert position == steps
    # The same model under another version number: it is the fingerprint that counts.
    async with running_gateway(NumpyExecutor(version_of(version=7)), secret_file=secret) as running:
        request = pb.RestoreSessionRequest(session_id="r", snapshot=blob)
        restored = await running.stub.RestoreSession(request)
        assert (restored.position, restored.model.version) == (steps, 7)
        assert await running.stub.RestoreSession(request) == restored
        reply = await running.stub.Step(step_request("r", inputs[steps:], steps))
        np.testing.assert_array_equal(outputs_of(reply), run_whole(inputs)[0][steps:])


async def test_a_snapshot_that_is_not_ours_or_of_another_model_is_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(b"s" * 32)
    async with running_gateway(secret_file=secret) as running:
        await running.create("s")
        await running.stub.Step(step_request("s", random_inputs(3), 0))
        blob, _ = await snapshot_of(running, "s")
        for position in (0, 1, 40, len(blob) - 1):
            changed = bytearray(blob)
            changed[position] ^= 1
            code, reason, _ = await refused(
                running.stub.RestoreSession(pb.RestoreSessionRequest(session_id="r", snapshot=bytes(changed)))
            )
            assert (code, reason) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT")
        for bad in (b"", blob[:20], b"\x02" + blob[1:]):
            code, _, _ = await refused(
                running.stub.RestoreSession(pb.RestoreSessionRequest(session_id="r", snapshot=bad))
            )
            assert code == grpc.StatusCode.INVALID_ARGUMENT
    async with running_gateway() as other:  # a secret of its own
        code, _, _ = await refused(other.stub.RestoreSession(pb.RestoreSessionRequest(session_id="r", snapshot=blob)))
        assert code == grpc.StatusCode.INVALID_ARGUMENT
    async with running_gateway(NumpyExecutor(version_of(fingerprint="another")), secret_file=secret) as other:
        code, reason, _ = await refused(
            other.stub.RestoreSession(pb.RestoreSessionRequest(session_id="r", snapshot=blob))
        )
        assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "FINGERPRINT_MISMATCH")
