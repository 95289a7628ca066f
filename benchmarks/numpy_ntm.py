"""The NTM step in plain NumPy, batched: a yardstick that runs wherever NumPy does.

``python benchmarks/numpy_ntm.py`` prints time steps a second on one core at batch 8 and 64. The network has 128 slots x
20, one read and one write head, and an LSTM controller of 100.
"""

import argparse
import os
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

SLOTS, DEPTH, UNITS, INPUT_DIM, OUTPUT_DIM = 128, 20, 100, 10, 8
HEAD = DEPTH + 6  # key, strength, gate, three shifts, gamma


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def softplus(x):
    return np.logaddexp(0, x)


def softmax(x):
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class NumpyNtm:
    """Random weights: the arithmetic is what counts."""

    def __init__(self):
        rng = np.random.default_rng(0)

        def normal(*shape):
            return rng.normal(size=shape, scale=0.1).astype(np.float32)

        self.kernel = normal(INPUT_DIM + DEPTH + UNITS, 4 * UNITS)
        self.heads = normal(UNITS, 2 * HEAD + 2 * DEPTH)
        self.output = normal(UNITS + DEPTH, OUTPUT_DIM)

    def first(self, batch):
        """Memory, read vector, the two weightings, hidden, carry."""
        focus = softmax(np.eye(1, SLOTS, dtype=np.float32) * 8)
        return (
            np.full((batch, SLOTS, DEPTH), 1e-6, np.float32),
            np.zeros((batch, DEPTH), np.float32),
            np.repeat(focus[:, None], batch, axis=0).repeat(2, axis=1),
            np.zeros((batch, UNITS), np.float32),
            np.zeros((batch, UNITS), np.float32),
        )

    def step(self, x, state):
        memory, read, weightings, hidden, carry = state
        gates = np.concatenate([x, read, hidden], axis=1) @ self.kernel
        i, f, c, o = np.split(gates, 4, axis=1)
        carry = sigmoid(f) * carry + sigmoid(i) * np.tanh(c)
        hidden = sigmoid(o) * np.tanh(carry)
        said = hidden @ self.heads
        heads = said[:, : 2 * HEAD].reshape(-1, 2, HEAD)
        weightings = self.address(memory, weightings, heads)
        erase, add = sigmoid(said[:, 2 * HEAD : 2 * HEAD + DEPTH]), np.tanh(said[:, 2 * HEAD + DEPTH :])
        write = weightings[:, 1, :, None]
        memory = memory * (1 - write * erase[:, None]) + write * add[:, None]
        read = np.matmul(weightings[:, :1], memory)[:, 0]
        out = sigmoid(np.concatenate([hidden, read], axis=1) @ self.output)
        return out, (memory, read, weightings, hidden, carry)

    def address(self, memory, weightings, heads):
        key = np.tanh(heads[..., :DEPTH])
        strength, gate, gamma = (heads[..., at : at + 1] for at in (DEPTH, DEPTH + 1, DEPTH + 5))
        shifts = softmax(heads[..., DEPTH + 2 : DEPTH + 5])
        norms = np.sqrt(np.einsum("bnd,bnd->bn", memory, memory) + 1e-12)[:, None]
        key_norms = np.sqrt((key**2).sum(axis=-1, keepdims=True) + 1e-12)
        cosine = np.matmul(key, memory.transpose(0, 2, 1)) / (norms * key_norms)
        gate = sigmoid(gate)
        gated = gate * softmax(softplus(strength) * cosine) + (1 - gate) * weightings
        shifted = sum(np.roll(gated, j - 1, axis=-1) * shifts[..., j : j + 1] for j in range(3))
        return softmax((1 + softplus(gamma)) * np.log(np.maximum(shifted, 1e-20)))


def measure(batch, seconds):
    """Time steps a second."""
    ntm = NumpyNtm()
    state, x = ntm.first(batch), np.random.default_rng(1).normal(size=(batch, INPUT_DIM)).astype(np.float32)
    calls, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        _, state = ntm.step(x, state)
        calls += 1
    return calls * batch / passed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3.0, help="for each measurement")
    options = parser.parse_args()
    for batch in (8, 64):
        print(f"batch {batch:2}: {measure(batch, options.seconds):9,.0f} steps/s on one core")


if __name__ == "__main__":
    main()
