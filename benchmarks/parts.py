"""The parts of ``serving.py`` that need a process of their own: ``python benchmarks/parts.py PART ARGUMENTS``."""

import asyncio
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))


def numpy_yardstick(seconds):
    import numpy_ntm

    print(numpy_ntm.measure(64, float(seconds)))


def cpp_yardstick(folder):
    """Builds the program, checks it against the layer, and tells where it is."""
    import yardstick

    program = yardstick.build(Path(folder))
    difference = yardstick.check(program, Path(folder))
    if difference > 1e-4:
        raise SystemExit(f"the C++ yardstick does not compute the layer's step: it differs by {difference}")
    print(program)


def export(directory):
    """The model that everything here runs."""
    import yardstick

    from training.export import export_model

    model = yardstick.model()
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.3))
    export_model(model, directory, name="ntm")


def bare_executor(directory):
    """Measures the executor by itself, for as long as it is asked to on standard input: batch, steps, XLA, seconds."""
    asyncio.run(_bare_executor(Path(directory)))


async def _bare_executor(directory):
    from service.executors.embedded import EmbeddedExecutor
    from service.types import VersionKey

    key, executors = VersionKey("ntm", 1), {}
    for xla in (True, False):
        executors[xla] = EmbeddedExecutor(directory, max_batch_size=64, max_steps=16, compile=xla)
        await executors[xla].start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        batch, steps, xla, seconds = json.loads(line)
        arrays = _batch(executors[xla], key, batch, steps)
        await executors[xla].step(key, arrays)
        await executors[xla].wait_compiled(300)
        measured = await _measure(executors[xla], key, arrays, batch * steps, seconds)
        print(json.dumps({"batch": batch, "steps": steps, "xla": xla, **measured}), flush=True)
    for executor in executors.values():
        await executor.close()


def fill(target, count):
    """Opens so many sessions and steps each once, so that each has a state."""
    from service.client import SequenceClient

    inputs = np.zeros((1, 10), np.float32)
    with SequenceClient(target, timeout=300) as client:
        for begin in range(0, int(count), 500):
            sessions = [client.create_session("ntm") for _ in range(begin, min(int(count), begin + 500))]
            client.step_many([(session, inputs) for session in sessions])


def _batch(executor, key, batch, steps):
    from service.types import StepBatch

    version = executor.versions()[key]
    rows, time_steps = executor.bucket(batch, steps)
    rng = np.random.default_rng(0)
    lengths = np.zeros(rows, np.int32)
    lengths[:batch] = steps
    return StepBatch(
        inputs=rng.random((rows, time_steps, version.input_dim), np.float32),
        lengths=lengths,
        reset=np.ones(rows, np.bool_),
        state=np.zeros((rows, version.state_size), np.float32),
    )


async def _measure(executor, key, arrays, steps, seconds):
    """One call after the other; then as the gateway does: as many under way as it says are worth having.

    The time of a call is that of those that ran on the calling thread, if any did, as a lone step's does in the
    gateway: of a caller who does nothing else the executor leaves some to a thread, for twice the time.
    """
    here, elsewhere = [], []
    end = time.perf_counter() + seconds / 2
    while time.perf_counter() < end:
        began = time.perf_counter()
        run = executor.begin(key, arrays)
        calls = here if run.done() else elsewhere
        await run
        calls.append(time.perf_counter() - began)
    calls = 0
    began, cpu = time.perf_counter(), _cpu()

    async def keep_calling():
        nonlocal calls
        while time.perf_counter() < began + seconds:
            await executor.step(key, arrays)
            calls += 1

    await asyncio.gather(*(keep_calling() for _ in range(executor.max_in_flight)))
    passed = time.perf_counter() - began
    return {
        "ms": 1e3 * float(np.median(here or elsewhere)),
        "steps_per_s": calls * steps / passed,
        "cpu_us_per_step": 1e6 * (_cpu() - cpu) / (calls * steps),
    }


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    {part.__name__: part for part in (numpy_yardstick, cpp_yardstick, export, bare_executor, fill)}[sys.argv[1]](
        *sys.argv[2:]
    )
