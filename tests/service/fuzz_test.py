"""Hostile bytes against a gateway process: it answers or refuses each, and everybody else's session stays exact.

``NTM_FUZZ_MESSAGES=100000 pytest tests/service/fuzz_test.py`` is the long run.
"""

import os
import random
import socket
import threading

import grpc
import numpy as np
from google.protobuf import duration_pb2

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc
from tests.service.gateway_process import gateway_process, resident_bytes
from tests.service.support import outputs_of, random_inputs, run_whole, step_request

MESSAGES = int(os.environ.get("NTM_FUZZ_MESSAGES", "2000"))
SERVICE = "/ntm_serving.v1.SequenceService/"
SPEC = pb.ModelSpec(name="sums", version=1)


def seeds(rng):
    """Valid messages of every method, to be broken."""
    step = step_request(rng.choice(["f0", "f1"]), random_inputs(rng.randrange(1, 9)), rng.randrange(4), "r", 1.0)
    name = rng.choice(["f0", "f1", "x"])
    second = duration_pb2.Duration(seconds=5)
    return [
        (SERVICE + "Step", step),
        (SERVICE + "BatchStep", pb.BatchStepRequest(requests=[step] * 3)),
        (SERVICE + "StreamSteps", pb.StreamStepsRequest(requests=[step] * 3, cancel=["r"])),
        (SERVICE + "CreateSession", pb.CreateSessionRequest(session_id=name, model=SPEC, ttl=second)),
        (SERVICE + "GetSession", pb.GetSessionRequest(session_id=name)),
        (SERVICE + "InspectSession", pb.InspectSessionRequest(session_id=name)),
        (SERVICE + "ListSessions", pb.ListSessionsRequest(page_size=3, page_token="x")),
        (SERVICE + "DeleteSession", pb.DeleteSessionRequest(session_id="x")),
        (SERVICE + "ForkSession", pb.ForkSessionRequest(session_id=name, fork_session_id="x", ttl=second)),
        (SERVICE + "SnapshotSession", pb.SnapshotSessionRequest(session_id=name)),
        (SERVICE + "RestoreSession", pb.RestoreSessionRequest(session_id="x", snapshot=rng.randbytes(90))),
        ("/ntm_serving.v1.ModelService/GetModel", model_pb.GetModelRequest(name="sums")),
    ]


def broken(rng, data):
    """``data`` with bits flipped, bytes cut, doubled, replaced by large varints, or none of it kept."""
    data = bytearray(data)
    for _ in range(rng.randrange(4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(5):
            case 0 if data:
                data[at % len(data)] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = data[: rng.randrange(len(data) + 1)]
            case 3:
                data[at : at + 2] = b"\xff" * rng.randrange(11)
            case 4:
                data[at : at + rng.randrange(20)] = rng.randbytes(rng.randrange(20))
    return bytes(data)


def send(channel, method, data):
    """Sends raw bytes; the code that comes back."""
    try:
        if method.endswith("StreamSteps"):
            for _ in channel.stream_stream(method)(iter([data]), timeout=20):
                pass
        else:
            channel.unary_unary(method)(data, timeout=20)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # of its own timeout, which a flipped bit may make short
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,  # gRPC's own answer to what is no protobuf
    grpc.StatusCode.UNKNOWN,  # likewise
}


def fuzz(port, seed, count, codes):
    rng = random.Random(seed)
    with grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        for _ in range(count):
            method, message = rng.choice(seeds(rng))
            codes.add(send(channel, method, broken(rng, message.SerializeToString())))


def half_closed(port, count):
    """Connections that say something, or nothing, and go away."""
    rng = random.Random(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    for number in range(count):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall([b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + rng.randbytes(40)][number % 4])
            if number % 2:
                connection.shutdown(socket.SHUT_WR)


def test_hostile_bytes_end_nothing_and_everybody_else_stays_exact(tmp_path):
    with gateway_process(tmp_path / "port") as (process, port):
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = sequence_service_pb2_grpc.SequenceServiceStub(channel)
            for name in ("f0", "f1", "witness"):
                stub.CreateSession(pb.CreateSessionRequest(session_id=name, model=SPEC))
            codes = set()
            fuzz(port, 0, 200, codes)  # what is allocated once is allocated now
            before = resident_bytes(process.pid)
            workers = [threading.Thread(target=fuzz, args=(port, seed, MESSAGES // 2, codes)) for seed in (1, 2)]
            workers.append(threading.Thread(target=half_closed, args=(port, 100)))
            for worker in workers:
                worker.start()
            inputs = random_inputs(400)
            came = [
                outputs_of(stub.Step(step_request("witness", inputs[begin : begin + 2], begin), timeout=60))
                for begin in range(0, 400, 2)
            ]
            for worker in workers:
                worker.join()
            np.testing.assert_array_equal(np.concatenate(came), run_whole(inputs)[0])
            assert codes <= EXPECTED
            for name in ("f0", "f1"):
                stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))
            after = resident_bytes(process.pid)
        assert process.poll() is None
        assert after <= 1.1 * before, f"resident {before} before, {after} after {MESSAGES} messages"
