"""What a training step costs on each backend that is installed, beside a batched NTM in PyTorch (``torch_ntm.py``).

The copy model of the paper: a memory of 128 x 20, an LSTM controller of 100, one read and one write head; batches of 32
sequences of 42 time steps, copy's longest. A step is forward, cross entropy, backward, clipping of the global norm and
Adam, batch in and loss out, in one of two ways: ``train_on_batch`` of a compiled Keras model, or `training.steps`, with
which ``training/train.py`` makes many updates in a call, here also with the batch shared out over two CPU devices. Each
contender is a process of its own on the same two cores; they take turns, and what counts is the ratio of their medians.
Drawing the batches is measured by itself.

    make test-backends                                # makes the environment with JAX and PyTorch
    .venv-backends/bin/python benchmarks/training_speed.py [--rounds 3] [--seconds 5] [--json FILE]

PyTorch is given one thread and two, since it is often faster with one; the better is the peer.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BATCH, TIME, INPUT_DIM, OUTPUT_DIM = 32, 42, 10, 8
SLOTS, DEPTH, UNITS = 128, 20, 100
# Updates in a call of `training.steps`.
CHUNK = 10


class Contender(NamedTuple):
    """A Keras backend, the way of its step (``keras``, ``trainer``, ``peer``), and what it is given."""

    backend: str
    way: str
    threads: int = 2
    devices: int = 1


CONTENDERS = {
    "layer, TensorFlow, Keras": Contender("tensorflow", "keras"),
    "layer, TensorFlow, trainer": Contender("tensorflow", "trainer"),
    "layer, JAX, Keras": Contender("jax", "keras"),
    "layer, JAX, trainer": Contender("jax", "trainer"),
    "layer, JAX, trainer, 2 devices": Contender("jax", "trainer", devices=2),
    "layer, PyTorch, Keras": Contender("torch", "keras", threads=1),
    "PyTorch NTM, 1 thread": Contender("torch", "peer", threads=1),
    "PyTorch NTM, 2 threads": Contender("torch", "peer"),
}


def main():
    options = parse_options()
    if options.contender:
        serve(*step_of(CONTENDERS[options.contender]), options.seconds)
        return
    results = measure(options)
    batches_ms = drawing_ms()
    print(f"drawing a batch of copy sequences: {batches_ms:.2f} ms")
    quartiles = {name: [round(q, 2) for q in statistics.quantiles(steps, n=4)] for name, steps in results.items()}
    record = {**machine(), "quartiles_ms": quartiles, "batch_ms": batches_ms}
    layer, peer = (best(results, kind) for kind in ("layer", "PyTorch NTM"))
    if layer and peer:
        record["ratio"] = peer[0] / layer[0]
        print(f"{layer[1]} is {record['ratio']:.1f} times as fast as {peer[1]}")
    if options.json:
        options.json.write_text(json.dumps(record, indent=2) + "\n")


def best(results, kind):
    """The fastest of a kind, with its median; None where there is none."""
    return min(((median, name) for name, median in medians(results).items() if name.startswith(kind)), default=None)


def drawing_ms():
    """CPU milliseconds for the batch of an update, on one core."""
    sys.path.insert(0, str(ROOT))
    from training.tasks import make_task

    task, generator, count = make_task("copy"), np.random.default_rng(0), 100
    begin = time.process_time()
    for _ in range(count):
        task.training_batch(generator, BATCH)
    return 1e3 * (time.process_time() - begin) / count


def parse_options():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each turn (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="writes what was measured")
    parser.add_argument("--contender", choices=list(CONTENDERS), help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(options):
    """Milliseconds of every step of each contender, its turns one after the other."""
    print(machine())
    names = [name for name in CONTENDERS if importlib.util.find_spec(CONTENDERS[name].backend) is not None]
    processes = {name: start(name, options.seconds) for name in names}
    try:
        for process in processes.values():  # Compiled and warm, all of them, before the first is measured.
            expect(process, "ready")
        results = {name: [] for name in names}
        for _ in range(options.rounds):
            for name, process in processes.items():
                results[name] += turn(process)
    finally:
        for process in processes.values():
            process.kill()
    for name, steps in results.items():
        quartiles = statistics.quantiles(steps, n=4)
        print(
            f"{name:32} {quartiles[1]:7.1f} ms a step  (quartiles {quartiles[0]:.1f} to {quartiles[2]:.1f}), "
            f"{1e3 * BATCH / quartiles[1]:7,.0f} sequences/s"
        )
    return results


def medians(results):
    return {name: statistics.median(steps) for name, steps in results.items()}


def machine():
    return {"machine": platform.platform(), "cpus": cores(), "batch": BATCH, "time": TIME, "memory": [SLOTS, DEPTH]}


def cores():
    """The two cores that every contender runs on."""
    return sorted(os.sched_getaffinity(0))[:2]


def start(name, seconds):
    contender = CONTENDERS[name]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PYTHONSAFEPATH": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_ENABLE_ONEDNN_OPTS": "0",
        "KERAS_BACKEND": contender.backend,
        "OMP_NUM_THREADS": str(contender.threads),
        "JAX_NUM_CPU_DEVICES": str(contender.devices),
    }
    arguments = [sys.executable, __file__, "--contender", name, "--seconds", str(seconds)]
    return subprocess.Popen(
        arguments,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores()),
    )


def expect(process, word):
    line = process.stdout.readline().strip()
    if line != word:
        raise RuntimeError(
            f"expected {word!r} of {process.args[2:5]}; it said {line!r} and ended with {process.poll()}"
        )


def turn(process):
    """One turn: milliseconds of each step."""
    process.stdin.write("go\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


def step_of(contender):
    """A function that makes updates and returns their loss, and how many it makes."""
    if contender.way == "peer":
        return peer_step(contender.threads), 1
    if contender.way == "keras":
        return keras_step(), 1
    return trainer_step(contender.devices), CHUNK


def serve(step, updates, seconds):
    """Steps for so long, each time that a line comes; only then, so that who waits takes no core."""
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _line in sys.stdin:
        step()  # What the others pushed out of the caches.
        times, end = [], time.perf_counter() + seconds
        while len(times) < 2 or time.perf_counter() < end:
            begin = time.perf_counter()
            loss = step()
            times.append(1e3 * (time.perf_counter() - begin) / updates)
        assert np.isfinite(loss)
        print(json.dumps(times), flush=True)


def batch():
    """Bits in, bits out: the cost does not depend on what they are."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 2, (BATCH, TIME, INPUT_DIM)).astype("float32")
    return inputs, rng.integers(0, 2, (BATCH, TIME, OUTPUT_DIM)).astype("float32")


def build(activation):
    import keras

    from ntm import NeuralTuringMachine

    layer = NeuralTuringMachine(
        OUTPUT_DIM,
        n_slots=SLOTS,
        m_depth=DEPTH,
        controller_model=keras.layers.LSTMCell(UNITS),
        project_controller=True,
        return_sequences=True,
        activation=activation,
    )
    return keras.Sequential([keras.Input((None, INPUT_DIM)), layer])


def keras_step():
    import keras

    model = build("sigmoid")
    compiled = keras.backend.backend() != "torch"
    model.compile(keras.optimizers.Adam(1e-3, global_clipnorm=10.0), "binary_crossentropy", jit_compile=compiled)
    inputs, targets = batch()
    return lambda: float(model.train_on_batch(inputs, targets))


def trainer_step(devices):
    import keras

    from training.steps import Network, make_updates
    from training.steps.devices import all_devices

    spread = all_devices(BATCH) if devices > 1 else None
    with spread.scope() if spread else contextlib.nullcontext():
        model = build("linear")
        weights = model.trainable_variables
        average = [keras.Variable(keras.ops.copy(weight), trainable=False) for weight in weights]
        optimizer = keras.optimizers.Adam(1e-3)
        optimizer.build(weights)
        network = Network(model, weights, average, 0.99, optimizer, keras.Variable(10.0, trainable=False))
    updates = make_updates(network, compiled=True, spread=spread.spread if spread else None)
    inputs, targets = (np.stack([array] * CHUNK) for array in batch())
    masks = np.ones(inputs.shape[:3], "float32")
    return lambda: updates(inputs, targets, masks)[0]


def peer_step(threads):
    import torch
    from torch.nn import functional

    sys.path.append(str(Path(__file__).parent))
    from torch_ntm import TorchNTM

    torch.set_num_threads(threads)
    model = TorchNTM(INPUT_DIM, OUTPUT_DIM, units=UNITS, n_slots=SLOTS, m_depth=DEPTH)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    inputs, targets = map(torch.tensor, batch())

    def step():
        optimizer.zero_grad()
        loss = functional.binary_cross_entropy_with_logits(model(inputs), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main()
