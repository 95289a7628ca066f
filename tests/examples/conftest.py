import sys
from pathlib import Path

import numpy as np
import pytest

from service.types import ModelVersion, StateComponent, StepBatchResult, VersionKey
from tests.service.client.gateways import GatewayThread, LoopThread
from tests.service.support import NumpyExecutor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

BITS, SLOTS = 8, 128
LAYOUT = (
    StateComponent("memory", (SLOTS, BITS), 0, ("slots", "width")),
    StateComponent("read_weightings", (1, SLOTS), SLOTS * BITS, ("heads", "slots")),
    StateComponent("write_weightings", (1, SLOTS), SLOTS * (BITS + 1), ("heads", "slots")),
    StateComponent("controller/0", (2,), SLOTS * (BITS + 2)),
)
STATE_SIZE = SLOTS * (BITS + 2) + 2


class Copier(NumpyExecutor):
    """What a network that has learned to copy does, written down: it writes slot after slot, and reads them back."""

    def __init__(self):
        super().__init__(ModelVersion(VersionKey("copy", 1), "f", BITS + 2, BITS, STATE_SIZE, LAYOUT, "{}", "copy"))

    async def step(self, key, batch):
        outputs = np.zeros((*batch.inputs.shape[:2], BITS), np.float32)
        state = batch.state.copy()
        for row, length in enumerate(batch.lengths):
            if batch.reset[row]:
                state[row] = 0
            for time in range(length):
                outputs[row, time] = self._step(batch.inputs[row, time], state[row])
        return StepBatchResult(outputs, state)

    @staticmethod
    def _step(x, state):
        memory = state[: SLOTS * BITS].reshape(SLOTS, BITS)
        read, write = state[SLOTS * BITS : -2].reshape(2, SLOTS)
        read[:] = write[:] = 0
        slot, recalling = int(state[-2]), state[-1] > 0
        if x[BITS] or x[BITS + 1]:
            state[-2:] = 0, x[BITS + 1]
            return np.zeros(BITS, np.float32)
        state[-2] += 1
        if recalling:
            read[slot] = 1
            return memory[slot].copy()
        write[slot] = 1
        memory[slot] = x[:BITS]
        return np.zeros(BITS, np.float32)


@pytest.fixture
def copying_gateway():
    threads = LoopThread()
    gateway = GatewayThread(threads, executor=Copier())
    yield gateway
    gateway.close()
    threads.close()
