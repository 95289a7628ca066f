"""Users of sessions: each steps one, checks every output against the undisturbed run, and never gives up.

Half of them use the client library. The others speak gRPC themselves and are as bad as clients can be: they cancel,
repeat, send the same step to both gateways at once, and give up on a gateway after two seconds.
"""

import asyncio
import contextlib
import random
import secrets
import time
from collections import Counter

import grpc
import numpy as np

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc, tensor_pb2
from service.client import AsyncSequenceClient, GatewayError
from tests.chaos.model import NAME, OUTPUT_DIM, Chain

# Longer than it takes to restart anything on a machine that has much else to do.
PATIENCE_S = 150.0
_ATTEMPT_S = 2.0
# What a client may be told while something is broken. Anything else is a violation.
_RETRIED = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.INTERNAL,  # gRPC's own, of a connection that broke: told from ours by having no ErrorInfo
    grpc.StatusCode.UNKNOWN,
}


class Violation(Exception):
    """The promise was broken."""


class Record:
    """What all users together have seen."""

    def __init__(self):
        self.tally = Counter()
        self.violations = []
        self.answers = []  # (when, session) of each step that was answered

    def answered(self, name, commits=1):
        self.tally["commits"] += commits
        self.answers.append((time.monotonic(), name))


class User:
    """One session, in order."""

    def __init__(self, number, seed, record):
        self.choose = random.Random(f"{seed}/{number}")
        self.name = f"chaos-{number}-{secrets.token_hex(4)}"
        self.record = record
        self.chain = Chain()
        self.position = 0

    def next_chunk(self):
        """Inputs ``[time, 1]`` and the outputs ``[time, 4]`` that they must have."""
        steps = self.choose.randint(1, 8)
        inputs = np.array([[self.choose.randrange(1000)] for _ in range(steps)], np.float32)
        return inputs, self.chain.step(inputs)

    def check(self, outputs, expected):
        if outputs.shape != expected.shape or not np.array_equal(outputs, expected):
            raise Violation(f"{self.name} at {self.position}: outputs differ from the undisturbed run")

    async def run(self, over):
        """Steps the session until ``over``; what goes wrong goes into the record."""
        try:
            async with self.opened():
                while not over.is_set():
                    inputs, expected = self.next_chunk()
                    await self.step(inputs, expected)
                    self.position += len(inputs)
        except (Violation, GatewayError, grpc.RpcError) as error:
            self.record.violations.append(f"{self.name} at {self.position}: {type(error).__name__}: {error}")


class LibraryUser(User):
    """Uses the client library, which does the retrying."""

    def __init__(self, number, seed, record, client: AsyncSequenceClient):
        super().__init__(number, seed, record)
        self._client = client
        self._session = None

    @contextlib.asynccontextmanager
    async def opened(self):
        self._session = await self._client.create_session(NAME, session_id=self.name, timeout=PATIENCE_S)
        yield

    async def step(self, inputs, expected):
        self.check(await self._session.step(inputs, timeout=PATIENCE_S), expected)
        self.record.answered(self.name)


class BadUser(User):
    """Speaks gRPC itself."""

    def __init__(self, number, seed, record, stubs):
        super().__init__(number, seed, record)
        self._stubs = stubs
        self._last = None

    @contextlib.asynccontextmanager
    async def opened(self):
        request = pb.CreateSessionRequest(session_id=self.name, model=pb.ModelSpec(name=NAME))
        await self._until_done(lambda stub: stub.CreateSession(request, timeout=_ATTEMPT_S))
        yield

    async def step(self, inputs, expected):
        request = self._request(self.position, inputs)
        habit = self.choose.random()
        if habit < 0.1:
            await self._race(request, expected)
        elif habit < 0.2:
            await self._start_and_cancel(request)
        response = await self._until_done(lambda stub: stub.Step(request, timeout=_ATTEMPT_S))
        self._check_response(response, expected)
        self.record.answered(self.name)
        self._last = (request, expected)
        if 0.2 <= habit < 0.3:
            await self._repeat()
        elif 0.3 <= habit < 0.32:
            await self._ask_for_what_must_not_be(len(inputs))

    async def _race(self, request, expected):
        """The same step to every gateway at once: one commits, the others' commits are refused, all answer alike."""
        calls = [stub.Step(request, timeout=_ATTEMPT_S) for stub in self._stubs]
        for reply in await asyncio.gather(*calls, return_exceptions=True):
            if isinstance(reply, pb.StepResponse):
                self._check_response(reply, expected)
                self.record.tally["raced"] += 1
            else:
                self._check_retried(reply)

    async def _start_and_cancel(self, request):
        call = self.choose.choice(self._stubs).Step(request, timeout=_ATTEMPT_S)
        await asyncio.sleep(self.choose.uniform(0, 0.01))
        if call.cancel():
            self.record.tally["cancelled"] += 1
        await asyncio.gather(call, return_exceptions=True)

    async def _repeat(self):
        """The last step again: its reply, not another step."""
        request, expected = self._last
        response = await self._until_done(lambda stub: stub.Step(request, timeout=_ATTEMPT_S))
        self._check_response(response, expected)
        self.record.tally["replays"] += 1

    async def _ask_for_what_must_not_be(self, steps):
        """Other inputs where the last step was, and a step at a position that is not the session's."""
        position = self.position + steps
        other = np.full((steps, 1), 1001, np.float32)
        for begin, reason in ((self.position, "STEP_CONFLICT"), (position + 1000, "POSITION_MISMATCH")):
            request = self._request(begin, other)
            try:
                await self._until_done(lambda stub, request=request: stub.Step(request, timeout=_ATTEMPT_S))
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.ABORTED:
                    raise
                self.record.tally["aborted"] += 1
            else:
                raise Violation(f"{self.name}: a step at {begin} that must be a {reason} was answered")

    def _request(self, position, inputs):
        tensor = tensor_pb2.Tensor(
            dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=inputs.shape, content=inputs.astype("<f4").tobytes()
        )
        return pb.StepRequest(session_id=self.name, position=position, inputs=tensor)

    def _check_response(self, response, expected):
        outputs = np.frombuffer(response.outputs.content, "<f4").reshape(-1, OUTPUT_DIM)
        self.check(outputs, expected)
        if response.position != self.position + len(expected):
            raise Violation(f"{self.name} at {self.position}: the reply stands at {response.position}")

    async def _until_done(self, call):
        """Asks one gateway, then the other, until one answers."""
        began, attempt = time.monotonic(), self.choose.randrange(2)
        while True:
            try:
                return await call(self._stubs[attempt % len(self._stubs)])
            except grpc.aio.AioRpcError as error:
                self._check_retried(error)
                if time.monotonic() - began > PATIENCE_S:
                    raise Violation(f"{self.name} at {self.position}: nothing works for {PATIENCE_S} s") from error
                self.record.tally["failed attempts"] += 1
            attempt += 1
            await asyncio.sleep(self.choose.uniform(0.02, 0.2))

    def _check_retried(self, error):
        if not isinstance(error, grpc.aio.AioRpcError):
            if isinstance(error, asyncio.CancelledError):
                return
            raise error
        ours = "ntm-serving" in str(error.trailing_metadata())
        if error.code() not in _RETRIED or (
            ours and error.code() in {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
        ):
            raise error


def stubs_for(addresses):
    """A channel to each gateway, and its stub."""
    options = [("grpc.max_reconnect_backoff_ms", 500), ("grpc.initial_reconnect_backoff_ms", 100)]
    channels = [grpc.aio.insecure_channel(address, options) for address in addresses]
    return channels, [sequence_service_pb2_grpc.SequenceServiceStub(channel) for channel in channels]
