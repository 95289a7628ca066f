"""One client process of a load: steps sessions of a gateway for some seconds, and prints what it saw as JSON.

``python benchmarks/load.py MODE TARGET --sessions 64 --steps 1 --seconds 5``

Modes: ``coalesced``, the blocking client, in rounds of all its sessions (``--groups`` threads, each with its share);
``asyncio``, likewise the asyncio client (``--groups`` tasks); ``stream``, a connection and a stream for each session, a
step a message; ``unary``, likewise with a call for each step; ``predict``, ``Predict`` of one session on a TensorFlow
Serving, with no gateway between; ``open``, Poisson arrivals of ``--rate`` requests a second over all sessions, through
the asyncio client. Closed loops but for the last, whose latency counts from when a request was due.
"""

import argparse
import asyncio
import json
import math
import os
import random
import secrets
import threading
import time

os.environ.setdefault("GRPC_EXPERIMENTS", "-event_engine_client")  # as docs/client.md advises; of every load alike

import grpc
import numpy as np
import processes
import uvloop

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc, tensor_pb2
from service.client import AsyncSequenceClient, SequenceClient

WARM_UP_S = 0.5


class Watch:
    """Counts what is answered for some seconds, once the sessions are open and the warm-up is over.

    Args:
        seconds: For how long.
        pids: Processes whose CPU time is read when they begin and when they end: ``server``, and maybe ``store``.
    """

    def __init__(self, seconds, pids):
        self._seconds = seconds
        self._pids = pids
        self._latencies = []
        self._cpu = []  # at the begin and at the end
        self._lock = threading.Lock()

    def start(self):
        """All sessions are open."""
        self._begin = time.perf_counter() + WARM_UP_S
        self._end = self._begin + self._seconds

    def running(self):
        """Whether to go on. Asked before each request."""
        now = time.perf_counter()
        if now >= (self._begin, self._end, math.inf)[len(self._cpu)]:
            with self._lock:
                if now >= (self._begin, self._end, math.inf)[len(self._cpu)]:
                    self._cpu.append(processes.cpu_of(**self._pids) | {"client": time.process_time()})
        return now < self._end

    def saw(self, started, requests=1):
        """So many requests were answered."""
        now = time.perf_counter()
        if self._begin <= now <= self._end:
            self._latencies += [now - started] * requests

    def report(self, steps):
        """What was seen; CPU time of each part for each request."""
        count = max(1, len(self._latencies))
        spread = np.percentile(self._latencies, (50, 90, 99)) * 1e3 if self._latencies else [0, 0, 0]
        begin, end = self._cpu
        return {
            "requests": len(self._latencies),
            "requests_per_s": len(self._latencies) / self._seconds,
            "steps_per_s": len(self._latencies) * steps / self._seconds,
            "p50_ms": spread[0],
            "p90_ms": spread[1],
            "p99_ms": spread[2],
            **{f"{part}_cpu_us": 1e6 * (end[part] - begin[part]) / count for part in end},
        }


def coalesced(options, inputs, watch):
    with SequenceClient(options.target) as client:
        sessions = [client.create_session(options.model) for _ in range(options.sessions)]
        watch.start()

        def rounds(mine):
            work = [(session, inputs) for session in mine]
            while watch.running():
                started = time.perf_counter()
                client.step_many(work, timeout=60)
                watch.saw(started, len(mine))

        threads = [
            threading.Thread(target=rounds, args=(sessions[g :: options.groups],)) for g in range(options.groups)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


async def asyncio_client(options, inputs, watch):
    async with AsyncSequenceClient(options.target) as client:
        sessions = [await client.create_session(options.model) for _ in range(options.sessions)]
        watch.start()

        async def rounds(mine):
            work = [(session, inputs) for session in mine]
            while watch.running():
                started = time.perf_counter()
                await client.step_many(work, timeout=60)
                watch.saw(started, len(mine))

        await asyncio.gather(*(rounds(sessions[g :: options.groups]) for g in range(options.groups)))


async def connection(options, inputs, watch, opened):
    """One session over a channel of its own, stepped once ``opened`` says that all others are open."""
    channel = grpc.aio.insecure_channel(options.target, [("grpc.use_local_subchannel_pool", 1)])
    stub = sequence_service_pb2_grpc.SequenceServiceStub(channel)
    name = secrets.token_hex(16)
    await stub.CreateSession(pb.CreateSessionRequest(session_id=name, model=pb.ModelSpec(name=options.model)))
    tensor = tensor_pb2.Tensor(
        dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=inputs.shape, content=inputs.astype("<f4").tobytes()
    )
    stream = stub.StreamSteps() if options.mode == "stream" else None
    position = 0
    await opened()
    while watch.running():
        started = time.perf_counter()
        request = pb.StepRequest(session_id=name, position=position, inputs=tensor)
        if stream is not None:
            await stream.write(pb.StreamStepsRequest(requests=[request]))
            response = (await stream.read()).responses[0]
        else:
            response = await stub.Step(request)
        if response.HasField("status"):
            raise RuntimeError(str(response.status))
        position = response.position
        watch.saw(started)
    await channel.close()


async def connections(options, inputs, watch):
    left, everyone = options.sessions, asyncio.Event()

    async def opened():
        nonlocal left
        left -= 1
        if not left:
            watch.start()
            everyone.set()
        await everyone.wait()

    await asyncio.gather(*(connection(options, inputs, watch, opened) for _ in range(options.sessions)))


async def predict(options, inputs, watch):
    """One session whose state this client keeps: what a step costs without a gateway."""
    from service.executors.serving_messages import decode_predict, encode_predict, float_output, string_output
    from service.types import VersionKey

    key, reset, state = VersionKey(options.model, 1), np.ones(1, np.bool_), None
    lengths = np.full(1, len(inputs), np.int32)
    async with grpc.aio.insecure_channel(options.target) as channel:
        call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
        describe = decode_predict(await call(encode_predict(key, "describe", {})))
        size = json.loads(string_output(describe, "config"))["state_size"]
        watch.start()
        while watch.running():
            started = time.perf_counter()
            arrays = {
                "inputs": inputs[None],
                "lengths": lengths,
                "reset": reset,
                "state": np.zeros((1, size), np.float32) if state is None else state,
            }
            answer = decode_predict(await call(encode_predict(key, "step", arrays)))
            float_output(answer, "outputs", (1, len(inputs), None))
            state, reset = float_output(answer, "state", (1, size)), np.zeros(1, np.bool_)
            watch.saw(started)


async def open_loop(options, inputs, watch):
    draw = random.Random(0)
    async with AsyncSequenceClient(options.target) as client:
        idle = [await client.session(options.model) for _ in range(options.sessions)]
        late = 0
        watch.start()

        async def step(session, due):
            await session.step(inputs, timeout=60)
            watch.saw(due)
            idle.append(session)

        tasks = set()
        due = time.perf_counter()
        while watch.running():
            due += draw.expovariate(options.rate)
            if (pause := due - time.perf_counter()) > 0:
                await asyncio.sleep(pause)
            if not idle:  # every session has a step under way: the rate is more than they can take
                late += 1
                continue
            task = asyncio.create_task(step(idle.pop(draw.randrange(len(idle))), due))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
        return late


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["coalesced", "asyncio", "stream", "unary", "predict", "open"])
    parser.add_argument("target")
    parser.add_argument("--model", default="ntm")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1, help="time steps of a request")
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--groups", type=int, default=1, help="threads of mode coalesced, tasks of asyncio")
    parser.add_argument("--rate", type=float, default=1000.0, help="requests a second of mode open")
    parser.add_argument("--server", type=int, help="process of the server, if its CPU time is to be told")
    parser.add_argument("--store", type=int, help="process of its store, likewise")
    options = parser.parse_args()
    inputs = np.random.default_rng(0).random((options.steps, 10), np.float32)
    watch = Watch(options.seconds, {"server": options.server, "store": options.store})
    refused = 0
    if options.mode == "coalesced":
        coalesced(options, inputs, watch)
    else:
        run = {"asyncio": asyncio_client, "open": open_loop, "predict": predict}.get(options.mode, connections)
        refused = uvloop.run(run(options, inputs, watch))
    print(json.dumps({**vars(options), **watch.report(options.steps), "not_sent": refused or 0}))


if __name__ == "__main__":
    main()
