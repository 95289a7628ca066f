# The methods are called what the service's rpcs are called.
# ruff: noqa: N802
"""A server whose answers a test writes, and which counts what it is sent: the other end of the wire, nothing else."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
from google.protobuf import empty_pb2

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc


def echo(request):
    """Answers a step with its own inputs."""
    return pb.StepResponse(
        request_id=request.request_id,
        session_id=request.session_id,
        position=request.position + request.inputs.shape[0],
        outputs=request.inputs,
    )


def echo_all(message):
    """Answers a message so."""
    return pb.StreamStepsResponse(responses=[echo(request) for request in message.requests])


class ScriptedServicer(sequence_service_pb2_grpc.SequenceServiceServicer):
    """Echoes steps; ``messages`` and ``metadata`` tell what came, ``before`` is called with each message.

    ``answer`` makes what is sent of a message; ``closed`` counts the streams on which the client has said that it sends
    nothing more.
    """

    def __init__(self):
        self.messages = []
        self.metadata = []
        self.before = lambda message, context: None
        self.answer = echo_all
        self.closed = threading.Semaphore(0)

    def CreateSession(self, request, context):
        self.metadata.append(dict(context.invocation_metadata()))
        return pb.Session(session_id=request.session_id, model=request.model)

    def DeleteSession(self, request, context):
        return empty_pb2.Empty()

    def StreamSteps(self, request_iterator, context):
        self.metadata.append(dict(context.invocation_metadata()))
        for message in request_iterator:
            self.messages.append(message)
            self.before(message, context)
            yield self.answer(message)
        self.closed.release()


@contextmanager
def scripted_server(credentials=None):
    """Yields the servicer and its target; with ``credentials`` it speaks TLS."""
    servicer = ScriptedServicer()
    server = grpc.server(ThreadPoolExecutor(8))
    sequence_service_pb2_grpc.add_SequenceServiceServicer_to_server(servicer, server)
    if credentials is None:
        port = server.add_insecure_port("127.0.0.1:0")
    else:
        port = server.add_secure_port("127.0.0.1:0", credentials)
    server.start()
    try:
        yield servicer, f"localhost:{port}"
    finally:
        server.stop(0).wait()
