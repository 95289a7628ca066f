"""Hostile clients, and a run of all of them against a gateway process.

``python tests/service/hostile.py --messages 100000`` sends that many broken messages: valid ones with bits flipped and
bytes cut, doubled and replaced, and valid protobufs with senseless values. Beside them come messages that are too
large or grow when they are parsed or inflated, streams whose client does not read, connections that stop in the
middle, and cancelled calls. All the while another session is stepped. The gateway has to answer or refuse everything,
the session to be exact, and the memory to come back to within a tenth of what it was when the gateway had served some
hundred ordinary requests.
"""

import argparse
import random
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import grpc
import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc, tensor_pb2
from tests.service.broken_messages import SENSELESS, SERVICE, SPEC, VICTIMS, broken, seeds
from tests.service.gateway_process import gateway_process, resident_bytes
from tests.service.support import outputs_of, random_inputs, run_whole, step_request

MIB = 1024 * 1024

EXPECTED = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.ALREADY_EXISTS,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,  # of its own timeout, which a flipped bit may make short
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,  # by its client
}


def channel_to(port):
    """A connection of its own."""
    return grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)])


def send(channel, method, data, **options):
    """Sends raw bytes; the code that comes back."""
    try:
        if method.endswith("StreamSteps"):
            for _ in channel.stream_stream(method)(iter([data]), timeout=30, **options):
                pass
        else:
            channel.unary_unary(method)(data, timeout=30, **options)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def mutate(port, seed, count, codes):
    """Valid messages, broken."""
    rng = random.Random(seed)
    with channel_to(port) as channel:
        for _ in range(count):
            method, message = rng.choice(seeds(rng))
            codes[send(channel, method, broken(rng, message.SerializeToString()))] += 1


def senseless(port, count, codes):
    """Valid protobufs of values that make no sense."""
    with channel_to(port) as channel:

        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(st.sampled_from(sorted(SENSELESS)).flatmap(lambda m: st.tuples(st.just(m), SENSELESS[m])))
        def attack(pair):
            method, message = pair
            codes[send(channel, method, message.SerializeToString())] += 1

        attack()


def too_large(port, rounds, codes):
    """Over the codec's limit, over the transport's, a message that grows when it is parsed, one that is inflated."""
    step = step_request("f0", random_inputs(1), 0)
    fat = pb.StepRequest(
        session_id="f0", inputs=tensor_pb2.Tensor(dtype=1, shape=[2 * MIB, 2], content=bytes(17 * MIB))
    )
    grown = b"\x0a\x00" * 1_000_000
    deep = pb.StepRequest(session_id="f0", inputs=tensor_pb2.Tensor(shape=[1] * MIB))
    for _ in range(rounds):
        with channel_to(port) as channel:
            for method, data in (
                ("Step", fat.SerializeToString()),
                ("BatchStep", grown),
                ("StreamSteps", grown),
                ("Step", deep.SerializeToString()),
                ("BatchStep", pb.BatchStepRequest(requests=[step] * 20_000).SerializeToString()),
            ):
                codes[send(channel, SERVICE + method, data)] += 1
            codes[send(channel, SERVICE + "Step", bytes(140 * MIB), compression=grpc.Compression.Gzip)] += 1


def half_closed(port, count):
    """Connections that say something, or nothing, and go away."""
    rng = random.Random(0)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    for number in range(count):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall([b"", b"GET / HTTP/1.1\r\n\r\n", preface, preface + rng.randbytes(40)][number % 4])
            if number % 2:
                connection.shutdown(socket.SHUT_WR)


def slow(port, over, count):
    """Connections that stay, and say a byte now and then: the beginning of a frame that never ends."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + b"\x00\x40\x00\x01"
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(count)]
    sent = 0
    while not over.wait(0.2):
        for number, connection in enumerate(connections):
            try:
                connection.sendall(preface[sent % len(preface) :][:1])
            except OSError:  # the gateway has had enough of it
                connection.close()
                connections[number] = socket.create_connection(("127.0.0.1", port))
        sent += 1
    for connection in connections:
        connection.close()


def never_reading(port, over, streams):
    """Streams that send steps as fast as they are taken and read nothing of what comes back."""
    step = step_request("f1", random_inputs(8)).SerializeToString()
    message = b"".join(b"\x0a" + bytes([len(step)]) + step for _ in range(64)) if len(step) < 128 else b""

    def messages():
        while not over.is_set():
            yield message

    with channel_to(port) as channel:
        calls = [channel.stream_stream(SERVICE + "StreamSteps")(messages()) for _ in range(streams)]
        over.wait()
        for call in calls:
            call.cancel()


def cancelling(port, count, codes):
    """Calls that are given up as soon as they are made."""
    step = step_request("f0", random_inputs(8)).SerializeToString()
    with channel_to(port) as channel:
        method = channel.unary_unary(SERVICE + "Step")
        for number in range(count):
            call = method.future(step, timeout=30)
            if number % 3:
                time.sleep(0.0005)
            call.cancel()
            codes[call.code()] += 1


class Witness:
    """A session that is stepped all the while, and has to come out exact."""

    def __init__(self, stub):
        self._stub = stub
        self._inputs = random_inputs(1000)
        self._outputs = []

    def step(self):
        begin = 2 * len(self._outputs)
        if begin == len(self._inputs):
            self._check()
            begin = 0
        request = step_request("witness", self._inputs[begin : begin + 2], begin)
        self._outputs.append(outputs_of(self._answered(request)))

    def _answered(self, request):
        """The answer; asked for again where the machine stood still so long that limits of time passed."""
        while True:
            asked = time.monotonic()
            try:
                return self._stub.Step(request, timeout=600, wait_for_ready=True)
            except grpc.RpcError:
                if time.monotonic() - asked < 20:
                    raise

    def finish(self):
        self._check()

    def _check(self):
        came = np.concatenate(self._outputs)
        np.testing.assert_array_equal(came, run_whole(self._inputs[: len(came)])[0])
        self._outputs.clear()
        self._stub.DeleteSession(pb.DeleteSessionRequest(session_id="witness"))
        create(self._stub, "witness")


def ordinary(port):
    """A few hundred requests as clients make them; leaves nothing behind."""
    with channel_to(port) as channel:
        stub, names, inputs = sequence_service_pb2_grpc.SequenceServiceStub(channel), "abcdefgh", random_inputs(24)
        for name in names:
            create(stub, name)
        for at in range(24):
            steps = [step_request(name, inputs[at : at + 1], at, name) for name in names]
            match at % 3:
                case 0:
                    answered = [stub.Step(step) for step in steps]
                case 1:
                    answered = stub.BatchStep(pb.BatchStepRequest(requests=steps)).responses
                case 2:
                    replies = stub.StreamSteps(iter([pb.StreamStepsRequest(requests=steps)]))
                    answered = [response for reply in replies for response in reply.responses]
            assert [response.position for response in answered] == [at + 1] * len(names)
        for name in names:
            stub.InspectSession(pb.InspectSessionRequest(session_id=name))
            stub.DeleteSession(pb.DeleteSessionRequest(session_id=name))


def create(stub, name):
    stub.CreateSession(pb.CreateSessionRequest(session_id=name, model=SPEC))


def all_at_once(port, messages, codes):
    """Every attacker, each on threads and connections of its own; the threads that end, and what ends the others."""
    over = threading.Event()
    ending = [
        (mutate, 1, messages * 2 // 5, codes),
        (mutate, 2, messages * 2 // 5, codes),
        (senseless, messages // 5, codes),
        (half_closed, 100 + messages // 100),
        (cancelling, 100 + messages // 50, codes),
        (too_large, 2 + messages // 20_000, codes),
    ]
    staying = [(slow, over, 50), (never_reading, over, 8)]
    threads = [
        [
            threading.Thread(target=function, args=(port, *arguments), name=function.__name__)
            for function, *arguments in some
        ]
        for some in (ending, staying)
    ]
    for thread in (*threads[0], *threads[1]):
        thread.start()
    return threads[0], threads[1], over


def attack(process, port, messages, codes):
    """All of it, with the witness beside; returns how many steps that one made."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = sequence_service_pb2_grpc.SequenceServiceStub(channel)
        for name in (*VICTIMS, "witness"):
            create(stub, name)
        witness, steps = Witness(stub), 0
        ending, staying, over = all_at_once(port, messages, codes)
        while any(thread.is_alive() for thread in ending) or not steps:
            assert process.poll() is None, "the gateway ended"
            witness.step()
            steps += 1
        over.set()
        for thread in (*ending, *staying):
            thread.join(600)
            assert not thread.is_alive(), f"{thread.name} hangs"
        witness.finish()
        token = ""
        while True:  # what the attackers made
            page = stub.ListSessions(pb.ListSessionsRequest(page_size=1000, page_token=token))
            for session in page.sessions:
                stub.DeleteSession(pb.DeleteSessionRequest(session_id=session.session_id))
            if not (token := page.next_page_token):
                return steps


def settled_bytes(process):
    """Resident memory once it falls no more: the gateway gives back what was freed every few seconds."""
    least, falling = resident_bytes(process.pid), time.monotonic()
    while time.monotonic() < falling + 7:
        time.sleep(0.2)
        if (now := resident_bytes(process.pid)) < 0.99 * least:
            least, falling = now, time.monotonic()
    return least


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--messages", type=int, default=100_000)
    options = parser.parse_args()
    codes = Counter()
    with tempfile.TemporaryDirectory() as folder, gateway_process(Path(folder) / "port") as (process, port):
        fresh = resident_bytes(process.pid)
        ordinary(port)
        before = settled_bytes(process)
        began = time.monotonic()
        steps = attack(process, port, options.messages, codes)
        seconds = time.monotonic() - began
        after = settled_bytes(process)
    print(
        f"{sum(codes.values()):,} messages in {seconds:.0f} s; the gateway ended with exit code 0 when it was told to"
    )
    for code, count in sorted(codes.items(), key=lambda pair: -pair[1]):
        print(f"  {code.name:20}{count:9,}")
    print(f"the other session: {steps:,} steps, each exact")
    print(
        f"resident: {fresh / MIB:.1f} MiB fresh, {before / MIB:.1f} MiB at the start, {after / MIB:.1f} MiB at the end"
    )
    print(f"ratio of end to start: {after / before:.3f}")
    return 0 if set(codes) <= EXPECTED and after <= 1.1 * before else 1


if __name__ == "__main__":
    sys.exit(main())
