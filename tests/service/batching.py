"""A batcher around the test model, with a clock that is moved by hand."""

import asyncio

from service.batcher import Batcher, BatchPolicy
from tests.service.support import NumpyExecutor, version_of

POLICY = BatchPolicy(max_batch_size=4, max_steps_per_turn=3, executor_timeout=10)
NEVER = float("inf")


class Clock:
    """Moved by hand."""

    now = 0.0

    def __call__(self):
        return self.now


def make(executor=None, policy=POLICY):
    clock = Clock()
    executor = executor or NumpyExecutor()
    return Batcher(executor, policy=policy, clock=clock), executor, clock


def submit(batcher, inputs, state=None, deadline=NEVER, version=None):
    return asyncio.create_task(batcher.submit(version or version_of(), inputs, state, deadline))


async def settle():
    """Lets everything that can run do so."""
    for _ in range(50):
        await asyncio.sleep(0)
