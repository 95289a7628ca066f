"""Sequences stepped in random chunks, batches and paddings: what has to give the same as running each of them whole."""

from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any

import numpy as np

from service.types import FloatArray, StepBatch, StepBatchResult

# What the control does wrong. Each must show in the outputs.
FAULTS = ("swapped states", "no reset", "a skipped time step")


def random_sequences(count: int, longest: int, width: int, seed: int = 0) -> list[FloatArray]:
    random = np.random.default_rng(seed)
    lengths = random.integers(longest // 2, longest + 1, count)
    return [random.normal(size=(length, width)).astype(np.float32) for length in lengths]


def batches(
    sequences: Sequence[FloatArray], state_size: int, seed: int = 0, fault: str = ""
) -> Generator[StepBatch, StepBatchResult, list[FloatArray]]:
    """Yields batches and takes their results, until every sequence is through; returns the outputs of each."""
    random = np.random.default_rng(seed)
    count = len(sequences)
    # What stands in a state before its reset must not matter.
    states = [random.normal(size=state_size).astype(np.float32) for _ in sequences]
    taken = [0] * count
    outputs: list[list[FloatArray]] = [[] for _ in sequences]
    turns = 0
    while any(taken[i] < len(sequences[i]) for i in range(count)):
        unfinished = [i for i in range(count) if taken[i] < len(sequences[i])]
        chosen = list(random.permutation(unfinished)[: random.integers(1, len(unfinished) + 1)])
        begun = [i for i in range(count) if 0 < taken[i] < len(sequences[i])]
        turns += 1
        if fault == "swapped states" and turns == 4:
            states[begun[0]], states[begun[1]] = states[begun[1]], states[begun[0]]
        batch = _batch(sequences, states, taken, chosen, random, fault)
        result = yield batch
        for row, i in enumerate(chosen):
            length = int(batch.lengths[row])
            outputs[i].append(result.outputs[row, :length].copy())
            states[i] = result.state[row].copy()
            taken[i] += length
        _check_padding(batch, result)
    return [np.concatenate(chunks) for chunks in outputs]


def _batch(
    sequences: Sequence[FloatArray], states: Any, taken: Any, chosen: Any, random: np.random.Generator, fault: str
) -> StepBatch:
    lengths = [int(random.integers(0, min(7, len(sequences[i]) - taken[i]) + 1)) for i in chosen]
    rows, steps = len(chosen) + int(random.integers(0, 3)), max(1, *lengths) + int(random.integers(0, 4))
    batch = StepBatch(
        # Garbage past the end, which must not matter either.
        inputs=random.normal(size=(rows, steps, sequences[0].shape[1])).astype(np.float32),
        lengths=np.zeros(rows, np.int32),
        reset=np.zeros(rows, np.bool_),
        state=random.normal(size=(rows, len(states[0]))).astype(np.float32),
    )
    for row, (i, length) in enumerate(zip(chosen, lengths, strict=True)):
        batch.inputs[row, :length] = sequences[i][taken[i] : taken[i] + length]
        if fault == "a skipped time step" and taken[i] == 0 and length:
            batch.inputs[row, 0] = 0
        batch.lengths[row] = length
        batch.reset[row] = taken[i] == 0 and fault != "no reset"
        batch.state[row] = states[i]
    return batch


def _check_padding(batch: StepBatch, result: StepBatchResult) -> None:
    """Zero past each length; a row without time steps keeps its state to the bit."""
    past = np.arange(batch.inputs.shape[1])[None, :] >= batch.lengths[:, None]
    assert not result.outputs[past].any()
    idle = (batch.lengths == 0) & ~batch.reset
    np.testing.assert_array_equal(result.state[idle], batch.state[idle])


def run(step: Callable[[StepBatch], StepBatchResult], plan: Generator[Any, Any, Any]) -> list[FloatArray]:
    """Drives `batches` to its end."""
    try:
        batch = next(plan)
        while True:
            batch = plan.send(step(batch))
    except StopIteration as end:
        return list(end.value)


async def run_async(
    step: Callable[[StepBatch], Awaitable[StepBatchResult]], plan: Generator[Any, Any, Any]
) -> list[FloatArray]:
    """The same, for an executor."""
    try:
        batch = next(plan)
        while True:
            batch = plan.send(await step(batch))
    except StopIteration as end:
        return list(end.value)


def tolerance(whole: Callable[[FloatArray], FloatArray], width: int) -> float:
    """1e-5, or ten times what the whole sequences differ by between batches of 1 and of 64, if that is more."""
    inputs = np.random.default_rng(3).normal(size=(64, 20, width)).astype(np.float32)
    together = whole(inputs)
    alone = np.concatenate([whole(inputs[row : row + 1]) for row in range(0, 64, 8)])
    return max(1e-5, 10 * float(np.abs(together[::8] - alone).max()))


def difference(came: Sequence[FloatArray], wanted: Sequence[FloatArray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(came, wanted, strict=True))
