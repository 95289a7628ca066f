"""The parts of ``serving.py`` that need a process of their own: ``python benchmarks/parts.py PART ARGUMENTS``."""

import asyncio
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))


def numpy_yardstick(seconds):
    import numpy_ntm

    print(numpy_ntm.measure(64, float(seconds)))


def cpp_yardstick(folder, seconds):
    import yardstick

    with tempfile.TemporaryDirectory(dir=folder) as name:
        program = yardstick.build(Path(name))
        print(yardstick.measure(program, batch=64, steps=16, seconds=float(seconds), threads=2))


def export(directory):
    """The model that everything here runs."""
    import yardstick

    from training.export import export_model

    model = yardstick.model()
    rng = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(rng.normal(size=weight.shape, scale=0.3))
    export_model(model, directory, name="ntm")


def bare_executor(directory, seconds):
    """The executor by itself, once all its shapes are compiled."""
    print(json.dumps(asyncio.run(_bare_executor(Path(directory), float(seconds)))))


async def _bare_executor(directory, seconds):
    from service.executors.embedded import EmbeddedExecutor
    from service.types import VersionKey

    executor = EmbeddedExecutor(directory, max_batch_size=256, max_steps=16)
    await executor.start()
    key = VersionKey("ntm", 1)
    cases = []
    for batch, steps in ((1, 1), (8, 1), (64, 1), (256, 1), (16, 16), (32, 16), (64, 16), (128, 16), (256, 16)):
        arrays = _batch(executor, key, batch, steps)
        await executor.step(key, arrays)
        await executor.wait_compiled(300)
        cases.append({"batch": batch, "steps": steps, **await _measure(executor, key, arrays, batch * steps, seconds)})
    await executor.close()
    return cases


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
    """As the gateway uses it: as many calls under way as it says are worth having."""
    alone = []
    end = time.perf_counter() + seconds / 2
    while time.perf_counter() < end:
        began = time.perf_counter()
        await executor.step(key, arrays)
        alone.append(time.perf_counter() - began)
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
        "ms": 1e3 * float(np.median(alone)),
        "steps_per_s": calls * steps / passed,
        "cpu_us_per_step": 1e6 * (_cpu() - cpu) / (calls * steps),
    }


def _cpu():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    {part.__name__: part for part in (numpy_yardstick, cpp_yardstick, export, bare_executor)}[sys.argv[1]](
        *sys.argv[2:]
    )
