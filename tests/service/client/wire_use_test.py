"""What the clients put on the wire: how many messages, which metadata, over what connection."""

import threading
import time

import grpc
import numpy as np
import pytest
import trustme

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.client import GatewayError, RetryPolicy
from tests.service.client.pipeline_bench import status
from tests.service.client.scripted import echo_all, scripted_server

CHUNK = np.ones((1, 4), np.float32)


@pytest.fixture
def server():
    with scripted_server() as (servicer, target):
        servicer.target = target
        yield servicer


def steps_of(servicer):
    return sum(len(message.requests) for message in servicer.messages)


def test_the_steps_of_step_many_share_one_message(connect, server):
    client = connect(server.target)
    sessions = [client.session("m") for _ in range(64)]
    for _ in range(3):
        client.step_many([(session, CHUNK) for session in sessions])
    assert [len(message.requests) for message in server.messages] == [64, 64, 64]


def test_steps_that_wait_while_a_message_is_on_its_way_share_the_next(connect, server):
    client = connect(server.target)
    sessions = [client.session("m") for _ in range(50)]
    arrived, go_on = threading.Event(), threading.Event()

    def wait(message, context):
        arrived.set()
        go_on.wait(20)

    server.before = wait
    futures = [sessions[0].start(CHUNK)]
    assert arrived.wait(20)
    for _ in range(4):
        futures += [session.start(CHUNK) for session in sessions]
    go_on.set()
    for future in futures:
        np.testing.assert_array_equal(future.result(20), CHUNK)
    assert steps_of(server) == 201
    assert len(server.messages) < 60


@pytest.mark.parametrize("later", [0.01, 1000.0])
def test_a_stream_whose_gateway_drains_is_closed_and_the_step_goes_on_another(connect, server, later):
    client = connect(server.target, retry=RetryPolicy(initial=0.01))
    session = client.session("m")
    draining = status(grpc.StatusCode.UNAVAILABLE, "DRAINING", later)

    def drain_once(message):
        server.answer = echo_all
        end = time.monotonic() + 20
        while not client.sender_waits():  # else it sees by itself that the stream is over
            assert time.monotonic() < end
            time.sleep(0.001)  # another thread has to come round
        refused = [pb.StepResponse(request_id=r.request_id, status=draining) for r in message.requests]
        return pb.StreamStepsResponse(responses=refused)

    server.answer = drain_once
    if later < 1:
        np.testing.assert_array_equal(session.step(CHUNK, timeout=20), CHUNK)
    else:  # past its time limit: it fails, and nothing comes after it
        with pytest.raises(GatewayError, match="DRAINING"):
            session.step(CHUNK, timeout=20)
    assert server.closed.acquire(timeout=20)  # the first: nothing more was sent on it
    assert not server.closed.acquire(blocking=False)
    assert len(server.messages) == 1 + (later < 1)


def test_a_message_stays_below_its_limit(connect, server):
    client = connect(server.target, max_message_bytes=64 * 1024)
    sessions = [client.session("m") for _ in range(40)]
    client.step_many([(session, np.ones((1000, 4))) for session in sessions])  # 16 kB each
    sizes = [message.ByteSize() for message in server.messages]
    assert steps_of(server) == 40
    assert len(sizes) >= 10
    assert max(sizes) <= 64 * 1024


def test_every_step_says_its_position_its_limit_and_an_id_of_its_own(connect, server):
    client = connect(server.target, timeout=7)
    session = client.session("m")
    session.step(np.ones((3, 4)))
    session.step(CHUNK, timeout=2.5)
    first, second = (message.requests[0] for message in server.messages)
    assert (first.position, second.position) == (0, 3)
    assert second.HasField("position")
    assert 6 < first.timeout.ToTimedelta().total_seconds() <= 7
    assert 2 < second.timeout.ToTimedelta().total_seconds() <= 2.5
    assert first.request_id != second.request_id


def test_a_step_given_up_is_cancelled_at_the_gateway(connect, server):
    client = connect(server.target)
    session, other = client.session("m"), client.session("m")
    go_on = threading.Event()
    server.before = lambda message, context: go_on.wait(20)
    with pytest.raises(grpc.RpcError) as caught:
        session.step(CHUNK, timeout=0.1)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    go_on.set()
    other.step(CHUNK)
    cancelled = [request_id for message in server.messages for request_id in message.cancel]
    assert cancelled == [server.messages[0].requests[0].request_id]


def test_a_stream_that_breaks_now_and_then_is_opened_anew(connect, server):
    client = connect(server.target, retry=RetryPolicy(initial=0.01, maximum=0.02))
    session = client.session("m")
    breaks = iter([grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE])

    def maybe_break(message, context):
        code = next(breaks, None)
        if code is not None:
            context.abort(code, "scripted")

    server.before = maybe_break
    np.testing.assert_array_equal(session.step(CHUNK), CHUNK)
    assert [message.requests[0].position for message in server.messages] == [0, 0, 0, 0]


@pytest.mark.parametrize("code", ["UNAUTHENTICATED", "PERMISSION_DENIED", "UNIMPLEMENTED", "RESOURCE_EXHAUSTED"])
def test_a_stream_that_is_refused_fails_its_steps_at_once(connect, server, code):
    session = connect(server.target).session("m")
    server.before = lambda message, context: context.abort(grpc.StatusCode[code], "scripted")
    with pytest.raises(grpc.RpcError, match="scripted") as caught:
        session.step(CHUNK)
    assert caught.value.code() is grpc.StatusCode[code]
    assert len(server.messages) == 1


def test_a_token_goes_with_calls_and_streams(connect, server):
    tokens = iter(["first", "second", "third"])
    client = connect(server.target, token=lambda: next(tokens))
    session = client.session("m")
    session.step(CHUNK)
    assert [metadata["authorization"] for metadata in server.metadata] == ["Bearer first", "Bearer second"]


def test_a_token_that_cannot_be_had_fails_the_step(connect, server):
    tokens = iter(["first"])
    client = connect(server.target, token=lambda: next(tokens))
    session = client.session("m")
    for step in (lambda: session.step(CHUNK), lambda: session.step(np.ones((200_000, 4)))):
        with pytest.raises(grpc.RpcError, match="no token could be had"):
            step()


def test_tls_with_an_authority_of_ones_own(connect):
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost")
    chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
    credentials = grpc.ssl_server_credentials([(certificate.private_key_pem.bytes(), chain)])
    with scripted_server(credentials) as (servicer, target):
        trusted = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
        session = connect(target, credentials=trusted, token="secret").session("m")
        np.testing.assert_array_equal(session.step(CHUNK), CHUNK)
        assert servicer.metadata[-1]["authorization"] == "Bearer secret"
        stranger = connect(target, credentials=grpc.ssl_channel_credentials(trustme.CA().cert_pem.bytes()), timeout=0.5)
        with pytest.raises(grpc.RpcError) as caught:
            stranger.session("m")
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert len(servicer.metadata) == 2
