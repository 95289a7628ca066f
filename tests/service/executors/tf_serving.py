"""TensorFlow Serving executors that notice quickly what their model servers do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from service.executors.tf_serving import TfServingExecutor
from service.types import VersionKey

ONE = VersionKey("sums", 1)
TWO = VersionKey("sums", 2)


@contextlib.asynccontextmanager
async def executor_of(target: str, *models: str, **options: Any) -> AsyncIterator[TfServingExecutor]:
    quick: dict[str, Any] = {"poll_interval": 0.05, "probe_timeout": 0.5, "start_timeout": 20.0}
    executor = TfServingExecutor(target, models=models or ("sums",), **(quick | options))
    try:
        await executor.start()
        yield executor
    finally:
        await executor.close()


async def until(condition: Any, limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.01)
