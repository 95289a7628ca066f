"""The snippets of docs/client.md, run in order against a real gateway."""

import re
from pathlib import Path

import numpy as np

from service.types import ModelVersion, StateComponent, StepBatchResult, VersionKey
from tests.service.support import NumpyExecutor

PAGE = Path(__file__).resolve().parents[3] / "docs/client.md"
SNIPPET = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Wide(NumpyExecutor):
    """A model of the copy model's widths: it counts time steps."""

    def __init__(self):
        layout = (StateComponent("memory", (2, 2), 0), StateComponent("count", (1,), 4))
        super().__init__(ModelVersion(VersionKey("copy", 1), "f", 10, 8, 5, layout, "{}"))

    async def step(self, key, batch):
        time = np.arange(1, batch.inputs.shape[1] + 1, dtype=np.float32)
        outputs = np.repeat((batch.state[:, 4:5] + time)[:, :, None], 8, axis=2)
        state = batch.state.copy()
        state[:, 4] += batch.lengths
        return StepBatchResult(outputs, state)


def test_the_snippets_run(start_gateway, capsys, monkeypatch):
    monkeypatch.setenv("GRPC_EXPERIMENTS", "")  # so that what a snippet sets does not outlive it
    gateway = start_gateway(executor=Wide())
    snippets = SNIPPET.findall(PAGE.read_text(encoding="utf-8"))
    assert len(snippets) >= 7
    world = {"__name__": "docs"}
    clients = set()
    for number, snippet in enumerate(snippets):
        code = snippet.replace("127.0.0.1:50051", gateway.target)
        exec(compile(code, f"{PAGE.name}, snippet {number}", "exec"), world)
        clients.add(world["client"])
    for client in clients:
        client.close()
    printed = capsys.readouterr().out
    assert " 20\n" in printed
    assert "StatusCode.INVALID_ARGUMENT INVALID_TENSOR" in printed
    assert "'memory': (2, 2)" in printed
