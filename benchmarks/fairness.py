"""What a flood of long chunks costs those who send one step: ``python benchmarks/fairness.py``.

50 clients, each with a connection and a session of its own, send one time step at a time, first alone and then beside
a client that floods: 100 sessions, each with a chunk of 500 time steps, the next as soon as the last is answered. Two
kinds of clients: *back to back*, the next step as soon as the last is answered; *now and then*, ten steps a second
each. All on one machine, clients and gateway on the same cores, one model, the NTM of the copy task.
"""

import argparse
import asyncio
import json
import random
import secrets
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import grpc
import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc, tensor_pb2

sys.path.insert(0, str(Path(__file__).resolve().parent))

import processes

CLIENTS = 50
FLOOD_SESSIONS, FLOOD_STEPS = 100, 500
WARM_UP_S = 1.0
ROUNDS = 5


async def step_alone(target, seconds, pause):
    """Latencies in seconds of 50 clients' one-step requests; ``pause`` is the mean time between them, 0 for none."""
    latencies = []
    end = time.perf_counter() + WARM_UP_S + seconds
    async with asyncio.TaskGroup() as group:
        for number in range(CLIENTS):
            group.create_task(one_client(target, end, seconds, pause, random.Random(number), latencies))
    return latencies


async def one_client(target, end, seconds, pause, draw, latencies):
    async with grpc.aio.insecure_channel(target, [("grpc.use_local_subchannel_pool", 1)]) as channel:
        stub = sequence_service_pb2_grpc.SequenceServiceStub(channel)
        name = secrets.token_hex(16)
        await stub.CreateSession(pb.CreateSessionRequest(session_id=name, model=pb.ModelSpec(name="copy")))
        content = np.random.default_rng(0).random((1, 10), np.float32).tobytes()
        tensor = tensor_pb2.Tensor(dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=(1, 10), content=content)
        position = 0
        while (began := time.perf_counter()) < end:
            request = pb.StepRequest(session_id=name, position=position, inputs=tensor)
            position = (await stub.Step(request, timeout=60)).position
            if began >= end - seconds:
                latencies.append(time.perf_counter() - began)
            if pause:
                await asyncio.sleep(draw.expovariate(1 / pause))


def flood(target):
    """Until it is ended: every session's next chunk as soon as its last is answered. Prints the chunks it got."""
    from service.client import SequenceClient

    chunk = np.random.default_rng(0).random((FLOOD_STEPS, 10), np.float32)
    done = 0
    with SequenceClient(target) as client:
        running = {session: session.step_async(chunk) for session in client_sessions(client)}
        print("flooding", flush=True)
        while True:
            for session, future in running.items():
                if future.done():
                    future.result()
                    running[session] = session.step_async(chunk)
                    done += 1
                    print(done, flush=True)
            time.sleep(0.005)  # the clients beside it need the cores; its queues hold far more than this


def client_sessions(client):
    return [client.create_session("copy") for _ in range(FLOOD_SESSIONS)]


@contextmanager
def flooding(target, folder):
    """A flood in a process of its own; yields a function that tells how many chunks it has got."""
    output = folder / f"flood-{time.monotonic_ns()}"
    with output.open("wb") as file:
        process = subprocess.Popen([sys.executable, __file__, "--flood", target], stdout=file, cwd=processes.ROOT)
    try:
        while "flooding" not in output.read_text():
            if process.poll() is not None:
                raise SystemExit("the flood ended")
            time.sleep(0.05)  # another process has to start and say so
        yield lambda: len(output.read_text().splitlines()) - 1
        if process.poll() is not None:
            raise SystemExit("the flood ended before the measurement did")
    finally:
        process.kill()
        process.wait()


def measure(target, seconds, pause):
    """Percentiles in ms, in a process of its own so that the flood's client does not share its interpreter."""
    command = [sys.executable, __file__, "--clients", target, "--seconds", str(seconds), "--pause", str(pause)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=processes.ROOT)
    return json.loads(done.stdout)


def percentiles(latencies):
    p50, p90, p99 = np.percentile(latencies, (50, 90, 99)) * 1e3
    return {
        "requests": len(latencies),
        "p50_ms": p50,
        "p90_ms": p90,
        "p99_ms": p99,
        "mean_ms": np.mean(latencies) * 1e3,
    }


def run(folder, seconds):
    processes.export_copy_model(folder / "models")
    results = []
    with processes.gateway(folder, "--model-dir", folder / "models") as gateway:
        gateway.wait_idle()
        with flooding(gateway.target, folder):  # what is compiled on demand is compiled
            measure(gateway.target, 2, 0)
        gateway.wait_idle()
        print(f"{'50 clients':14}{'':10}{'requests':>10}{'p50 ms':>9}{'p90 ms':>9}{'p99 ms':>9}{'mean ms':>9}")
        for kind, pause in (("back to back", 0), ("now and then", 0.1)):
            alone, beside, rate = rounds(gateway.target, folder, seconds, pause)
            show(kind, "alone", alone)
            show(kind, "flooded", beside)
            ratios = {name: beside[name] / alone[name] for name in ("p50_ms", "p90_ms", "p99_ms", "mean_ms")}
            print(
                f"{'':14}{'ratio':10}{'':10}"
                + "".join(f"{ratio:9.2f}" for ratio in ratios.values())
                + f"   the flood got {rate:,.0f} steps/s"
            )
            results.append(
                {"kind": kind, "alone": alone, "flooded": beside, "ratios": ratios, "flood_steps_per_s": rate}
            )
    return results


def rounds(target, folder, seconds, pause):
    """Alone and beside the flood in turns, so that both see the machine in the same moods; the medians of each."""
    alone, beside, rates = [], [], []
    for _ in range(ROUNDS):
        alone.append(measure(target, seconds / ROUNDS, pause))
        with flooding(target, folder) as chunks:
            while chunks() < FLOOD_SESSIONS:  # as many answers as it has sessions: all of them wait in the queues
                time.sleep(0.05)  # another process has to be answered
            before, began = chunks(), time.perf_counter()
            beside.append(measure(target, seconds / ROUNDS, pause))
            rates.append((chunks() - before) * FLOOD_STEPS / (time.perf_counter() - began))
    return median(alone), median(beside), float(np.median(rates))


def median(cases):
    return {name: float(np.median([case[name] for case in cases])) for name in cases[0]}


def show(kind, what, case):
    print(
        f"{kind:14}{what:10}{case['requests']:10,.0f}{case['p50_ms']:9.2f}{case['p90_ms']:9.2f}{case['p99_ms']:9.2f}"
        f"{case['mean_ms']:9.2f}",
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for each measurement (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=processes.ROOT / "benchmarks" / "results" / "fairness.json")
    parser.add_argument("--folder", type=Path, help="keeps the exported model there for the next run")
    parser.add_argument("--flood", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--clients", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--pause", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        flood(options.flood)
    elif options.clients:
        print(json.dumps(percentiles(asyncio.run(step_alone(options.clients, options.seconds, options.pause)))))
    else:
        with tempfile.TemporaryDirectory() as name:
            results = run(options.folder or Path(name), options.seconds)
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n")
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()
