"""A model whose state is a running hash: one step lost, repeated, or out of order shows in every output after it.

Four counters modulo a prime, each an affine step of its own. All values are whole numbers below 2**24, so float32
holds them exactly: outputs are compared for equality.
"""

import asyncio
from collections.abc import Mapping

import numpy as np

from service.types import ModelVersion, StateComponent, StepBatch, StepBatchResult, VersionKey, VersionStatus

PRIME = 4093
FACTORS = np.array([3, 977, 2111, 4001], np.int64)
TERMS = np.array([1, 57, 1033, 3001], np.int64)
INITIAL = np.array([17, 34, 51, 68], np.int64)

VERSION = ModelVersion(
    key=VersionKey("chain", 1),
    fingerprint="chain-1",
    input_dim=1,
    output_dim=4,
    state_size=4,
    state_layout=(StateComponent("counters", (4,), 0),),
)


def run_chain(inputs, state=None):
    """The model on ``inputs`` ``[time, 1]``: outputs ``[time, 4]`` and the state after them ``[4]``."""
    state = INITIAL if state is None else np.asarray(state).astype(np.int64)
    outputs = np.zeros((len(inputs), 4), np.float32)
    for number, x in enumerate(np.asarray(inputs)[:, 0].astype(np.int64)):
        state = (FACTORS * state + TERMS + x) % PRIME
        outputs[number] = state
    return outputs, state.astype(np.float32)


class ChainExecutor:
    """Runs the model; each call waits at ``gate`` where there is one."""

    max_in_flight = 1
    max_rows = None

    def __init__(self, gate=None):
        self.gate = gate
        self.steps = 0

    async def start(self) -> None: ...

    def versions(self) -> Mapping[VersionKey, ModelVersion]:
        return {VERSION.key: VERSION}

    def newest(self, model: str) -> VersionKey | None:
        return VERSION.key if model == VERSION.key.model else None

    def statuses(self) -> Mapping[VersionKey, VersionStatus]:
        return {}

    async def release(self, key: VersionKey) -> None: ...

    def bucket(self, rows: int, steps: int) -> tuple[int, int]:
        return rows, steps

    async def step(self, key: VersionKey, batch: StepBatch) -> StepBatchResult:
        if self.gate is not None:
            await self.gate("executor")
        await asyncio.sleep(0)
        if batch.native is not None:
            np.testing.assert_array_equal(batch.native, batch.state)
        outputs = np.zeros((*batch.inputs.shape[:2], 4), np.float32)
        state = batch.state.copy()
        for row, length in enumerate(batch.lengths):
            begin = None if batch.reset[row] else state[row]
            outputs[row, :length], state[row] = run_chain(batch.inputs[row, :length], begin)
            self.steps += int(length)
        return StepBatchResult(outputs, state, native=state)

    async def close(self) -> None: ...
