"""A bare grpc.aio server that answers each step of a stream with its own inputs: what a message costs by itself.

``python benchmarks/echo_server.py --listen 127.0.0.1:0 --port-file FILE``; ends with SIGTERM.
"""

import argparse
import asyncio
import signal
from pathlib import Path

import grpc

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc


class Echo(sequence_service_pb2_grpc.SequenceServiceServicer):
    """Answers, and computes nothing."""

    async def CreateSession(self, request, context):
        return pb.Session(session_id=request.session_id, model=request.model)

    async def Step(self, request, context):
        return answer(request)

    async def StreamSteps(self, request_iterator, context):
        async for message in request_iterator:
            yield pb.StreamStepsResponse(responses=[answer(request) for request in message.requests])


def answer(request):
    position = request.position + request.inputs.shape[0]
    return pb.StepResponse(request_id=request.request_id, position=position, outputs=request.inputs)


async def main(listen, port_file):
    server = grpc.aio.server()
    sequence_service_pb2_grpc.add_SequenceServiceServicer_to_server(Echo(), server)
    port = server.add_insecure_port(listen)
    await server.start()
    port_file.write_text(str(port))
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await stop.wait()
    await server.stop(0)


if __name__ == "__main__":
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True)
    parser.add_argument("--port-file", type=Path, required=True)
    options = parser.parse_args()
    uvloop.run(main(options.listen, options.port_file))
