"""The snippet of docs/contract.md, run, and the model that it makes, served."""

import re
from pathlib import Path

import pytest

from service.executors.embedded import EmbeddedExecutor
from service.types import VersionKey
from tests.service.executors.sequence_models import assert_close, expected, random_batch

PAGE = Path(__file__).resolve().parents[3] / "docs/contract.md"


async def test_a_model_made_by_the_page_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, PAGE.name, "exec"), {"__name__": "docs"})
    executor = EmbeddedExecutor(tmp_path / "models", compile=False, threads=1)
    await executor.start()
    try:
        key = VersionKey("sums", 1)
        assert executor.versions()[key].fingerprint == "sums, first edition"
        batch = random_batch(4, 5)
        assert_close(await executor.step(key, batch), expected(batch))
    finally:
        await executor.close()
