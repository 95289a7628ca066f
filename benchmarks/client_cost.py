"""What the Python client costs: its CPU time for each step, with the server in another process.

The server only echoes, so that nearly all of what is measured is the client: NumPy to protobuf, gRPC, the pipeline and
back. CPU time is that of the whole client process, all of its threads (``time.process_time``). Each figure is the
mean of some rounds, but for the latency, which is the median time of one whole call (``step_many``, a gathered round).

    python benchmarks/client_cost.py --json benchmarks/results/client_cost.json
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc
import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc
from service.client import AsyncSequenceClient, SequenceClient

SESSIONS = (1, 8, 64, 256)
TIME_STEPS = (1, 16)
FEATURES = 10
# CPU microseconds a step of one time step, where at least 64 steps share a message.
AIMS_US = {"step_many": 3.0, "asyncio step_many": 3.0, "step_async": 20.0, "asyncio gather": 20.0}


class Echo(sequence_service_pb2_grpc.SequenceServiceServicer):
    """Answers a step with its inputs; takes columns unless the client is to send requests."""

    def __init__(self, *, columns):
        self._columns = columns

    async def CreateSession(self, request, context):
        return pb.Session(session_id=request.session_id, model=request.model)

    async def StreamSteps(self, request_iterator, context):
        async for message in request_iterator:
            answer = pb.StreamStepsResponse(takes_columns=self._columns)
            for columns in message.columns:
                answer.columns.add(
                    request_ids=columns.request_ids,
                    positions=[position + columns.inputs.shape[1] for position in columns.positions],
                    outputs=columns.inputs,
                )
            for request in message.requests:
                answer.responses.add(
                    request_id=request.request_id,
                    session_id=request.session_id,
                    position=request.position + request.inputs.shape[0],
                    outputs=request.inputs,
                )
            yield answer


async def serve(*, columns):
    server = grpc.aio.server()
    sequence_service_pb2_grpc.add_SequenceServiceServicer_to_server(Echo(columns=columns), server)
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    await server.start()
    await server.wait_for_termination()


class Rounds:
    """Counts what rounds of steps take; the first few are left out."""

    def __init__(self, seconds):
        self._seconds = seconds
        self._cpu, self._wall = [], []

    def __iter__(self):
        """Yields for each round to be made."""
        end = time.perf_counter() + self._seconds
        while time.perf_counter() < end or len(self._wall) < 8:
            cpu_began, began = time.process_time(), time.perf_counter()
            yield
            self._cpu.append(time.process_time() - cpu_began)
            self._wall.append(time.perf_counter() - began)

    def figures(self, sessions):
        """CPU microseconds of each step, and wall milliseconds of each round."""
        cpu, wall = self._cpu[3:], self._wall[3:]
        return {
            "cpu_us_per_step": round(1e6 * statistics.fmean(cpu) / sessions, 2),
            "steps_per_s": round(sessions / statistics.fmean(wall)),
            "round_ms_p50": round(1e3 * statistics.median(wall), 3),
            "rounds": len(wall),
        }


def blocking(target, inputs, seconds):
    with SequenceClient(target) as client:
        steps = [(client.session("echo"), each) for each in inputs]
        rounds = Rounds(seconds)
        for _ in rounds:
            client.step_many(steps)
        yield "step_many", rounds.figures(len(steps))

        rounds = Rounds(seconds)
        for _ in rounds:
            for future in [session.step_async(each) for session, each in steps]:
                future.result()
        yield "step_async", rounds.figures(len(steps))


def asynchronous(target, inputs, seconds):
    async def run():
        async with AsyncSequenceClient(target) as client:
            steps = [(await client.session("echo"), each) for each in inputs]
            many, gathered = Rounds(seconds), Rounds(seconds)
            for _ in many:
                await client.step_many(steps)
            for _ in gathered:
                await asyncio.gather(*(session.step(each) for session, each in steps))
            return many.figures(len(steps)), gathered.figures(len(steps))

    yield from zip(("asyncio step_many", "asyncio gather"), asyncio.run(run()), strict=True)


def measure(target, seconds):
    for time_steps in TIME_STEPS:
        for sessions in SESSIONS:
            inputs = list(np.random.default_rng(0).random((sessions, time_steps, FEATURES), np.float32))
            for kind in (blocking, asynchronous):
                for how, figures in kind(target, inputs, seconds):
                    yield {"how": how, "sessions": sessions, "time_steps": time_steps, **figures}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each figure (default: 1)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--requests", action="store_true", help="not columns: a request for each step")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(columns=not options.requests))
        return 0
    command = [sys.executable, __file__, "--serve", *(["--requests"] if options.requests else [])]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        target = f"127.0.0.1:{server.stdout.readline().strip()}"
        results = []
        print(f"{'how':20}{'sessions':>10}{'time steps':>12}{'CPU us/step':>13}{'steps/s':>10}{'round p50 ms':>14}")
        for row in measure(target, options.seconds):
            results.append(row)
            print(
                f"{row['how']:20}{row['sessions']:10}{row['time_steps']:12}{row['cpu_us_per_step']:13.1f}"
                f"{row['steps_per_s']:10}{row['round_ms_p50']:14.2f}",
                flush=True,
            )
    finally:
        server.kill()
        server.communicate()
    many = [row for row in results if row["sessions"] >= 64 and row["time_steps"] == 1]
    for how, aim in AIMS_US.items():
        worst = max(row["cpu_us_per_step"] for row in many if row["how"] == how)
        print(f"{how}, at least 64 steps coalesced, one time step each: {worst:.1f} us at most (aim: {aim:.0f})")
    if options.json:
        machine = {"cpus": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": machine, "results": results}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
