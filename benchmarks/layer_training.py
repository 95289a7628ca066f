"""What a training step of the layer costs, beside a batched NTM in plain PyTorch (``torch_ntm.py``).

The copy model of the paper: a memory of 128 x 20, an LSTM controller of 100, one read and one write head; a batch of 32
sequences of 42 time steps. A step is forward, cross entropy, backward, clipping of the global norm, Adam; for the layer
it is ``train_on_batch`` of a compiled Keras model, arrays in and loss out. Each contender is a process of its own on
the same two cores; they take turns, and what counts is the ratio of their medians.

    make test-backends                                      # makes the environment with JAX and PyTorch
    .venv-backends/bin/python benchmarks/layer_training.py [--rounds 3] [--seconds 5] [--json FILE]

PyTorch is given one thread and two, since it is often faster with one; the better is the peer.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
BATCH, TIME, INPUT_DIM, OUTPUT_DIM = 32, 42, 10, 8
SLOTS, DEPTH, UNITS = 128, 20, 100
# Name: kind, threads.
CONTENDERS = {
    "layer, TensorFlow": ("tensorflow", 2),
    "layer, JAX": ("jax", 2),
    "PyTorch NTM, 1 thread": ("peer", 1),
    "PyTorch NTM, 2 threads": ("peer", 2),
}


def main():
    options = parse_options()
    if options.contender:
        kind, threads = CONTENDERS[options.contender]
        serve(peer_step(threads) if kind == "peer" else layer_step(), options.seconds)
        return
    results = measure(options)
    layer, peer = (min((v, k) for k, v in medians(results).items() if k.startswith(what)) for what in ("layer", "Py"))
    ratio = peer[0] / layer[0]
    print(f"{layer[1]} is {ratio:.1f} times as fast as {peer[1]}")
    if options.json:
        record = {**machine(), "step_ms": results, "medians_ms": medians(results), "ratio": ratio}
        options.json.write_text(json.dumps(record, indent=2) + "\n")


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
    processes = {name: start(name, options.seconds) for name in CONTENDERS}
    try:
        for process in processes.values():  # Compiled and warm, all of them, before the first is measured.
            expect(process, "ready")
        results = {name: [] for name in CONTENDERS}
        for _ in range(options.rounds):
            for name, process in processes.items():
                results[name] += turn(process)
    finally:
        for process in processes.values():
            process.kill()
    for name, steps in results.items():
        quartiles = statistics.quantiles(steps, n=4)
        print(f"{name:24} {quartiles[1]:7.1f} ms a step  (quartiles {quartiles[0]:.1f} to {quartiles[2]:.1f})")
    return results


def medians(results):
    return {name: statistics.median(steps) for name, steps in results.items()}


def machine():
    return {"machine": platform.platform(), "cpus": cores(), "batch": BATCH, "time": TIME, "memory": [SLOTS, DEPTH]}


def cores():
    """The two cores that every contender runs on."""
    return sorted(os.sched_getaffinity(0))[:2]


def start(name, seconds):
    kind, threads = CONTENDERS[name]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "KERAS_BACKEND": "torch" if kind == "peer" else kind,
        "OMP_NUM_THREADS": str(threads),
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


def serve(step, seconds):
    """Steps for so long, each time that a line comes; only then, so that who waits takes no core."""
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _line in sys.stdin:
        step()  # What the others pushed out of the caches.
        times, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            begin = time.perf_counter()
            loss = step()
            times.append(1e3 * (time.perf_counter() - begin))
        assert np.isfinite(loss)
        print(json.dumps(times), flush=True)


def batch():
    """Bits in, bits out: the cost does not depend on what they are."""
    rng = np.random.default_rng(0)
    inputs = rng.integers(0, 2, (BATCH, TIME, INPUT_DIM)).astype("float32")
    return inputs, rng.integers(0, 2, (BATCH, TIME, OUTPUT_DIM)).astype("float32")


def layer_step():
    import keras

    from ntm import NeuralTuringMachine

    layer = NeuralTuringMachine(
        OUTPUT_DIM,
        n_slots=SLOTS,
        m_depth=DEPTH,
        controller_model=keras.layers.LSTMCell(UNITS),
        project_controller=True,
        return_sequences=True,
    )
    model = keras.Sequential([keras.Input((None, INPUT_DIM)), layer])
    model.compile(keras.optimizers.Adam(1e-3, global_clipnorm=10.0), "binary_crossentropy", jit_compile=True)
    inputs, targets = batch()
    return lambda: float(model.train_on_batch(inputs, targets))


def peer_step(threads):
    import torch
    from torch.nn import functional

    sys.path.insert(0, str(Path(__file__).parent))
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
