"""An engine to try steps on."""

import asyncio

from service.admission import Admission
from service.batcher import Batcher, BatchPolicy
from service.digests import digest_of
from service.engine import Engine
from service.sessions.memory import MemoryStore
from service.types import SessionKey, StepCall
from tests.service.support import NumpyExecutor

KEY = SessionKey("p", "a")


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Bench:
    """An engine over the test model, with a store whose clock is moved by hand."""

    def __init__(self, executor=None, *, max_sessions=10, max_steps=100, store=None):
        self.executor = executor or NumpyExecutor()
        self.store_clock = Clock()
        self.store = store or MemoryStore(max_sessions=max_sessions, clock=self.store_clock)
        loop_clock = asyncio.get_running_loop().time
        policy = BatchPolicy(max_batch_size=8, max_steps_per_turn=4, executor_timeout=10)
        self.engine = Engine(
            store=self.store,
            executor=self.executor,
            batcher=Batcher(self.executor, policy=policy, clock=loop_clock),
            admission=Admission(max_steps=max_steps, max_bytes=10**6),
            clock=loop_clock,
        )

    async def __aenter__(self):
        await self.engine.start()
        return self

    async def __aexit__(self, *_):
        await self.engine.close()

    def create(self, key=KEY, model="sums", version=None, ttl=60.0):
        return self.engine.sessions.create(key, model, version, ttl)

    def call(self, inputs, position, key=KEY, limit=10.0):
        deadline = asyncio.get_running_loop().time() + limit
        return StepCall(key, position, inputs, digest_of(inputs.tobytes(), *inputs.shape), deadline)

    def step(self, inputs, position, **options):
        return self.engine.step(self.call(inputs, position, **options))
