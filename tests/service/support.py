"""What the gateway's tests share: a model made of NumPy, and a real gateway on a port of its own around it."""

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, MutableSequence, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np

from ntm_serving.v1 import model_service_pb2_grpc, sequence_service_pb2_grpc
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.codec import render_tensor
from service.config import Settings
from service.digests import Digests
from service.errors import ModelVersionUnavailable
from service.executors import Executor
from service.server import Gateway
from service.sessions import SessionStore
from service.sessions.memory import MemoryStore
from service.types import (
    FloatArray,
    ModelVersion,
    StateComponent,
    StepBatch,
    StepBatchResult,
    StepCall,
    StepCalls,
    VersionKey,
    VersionStatus,
)

INPUT_DIM, OUTPUT_DIM, STATE_SIZE = 2, 3, 5


def initial_state() -> FloatArray:
    """Not zeros: a lost ``reset`` has to show."""
    return np.array([0.5, -0.25, 1.0, 0.0, 0.0], np.float32)


def step_once(state: FloatArray, x: FloatArray) -> tuple[FloatArray, FloatArray]:
    """One time step of the test model, for one row: every past input, and their order, shows in what comes out."""
    after = np.empty_like(state)
    after[:2] = np.float32(0.75) * state[:2] + x
    after[2] = np.float32(-0.5) * state[2] + after[0]
    after[3] = state[3] + 1  # time steps ever run
    after[4] = x.sum()
    return np.array([after[0] - after[1], after[2], after[3]], np.float32), after


def run_whole(inputs: FloatArray, state: FloatArray | None = None) -> tuple[FloatArray, FloatArray]:
    """The test model on a whole sequence ``[time, 2]``: outputs ``[time, 3]`` and the state after them."""
    state = initial_state() if state is None else state
    outputs = []
    for x in inputs:
        out, state = step_once(state, x)
        outputs.append(out)
    return np.array(outputs, np.float32).reshape(-1, OUTPUT_DIM), state


def alike(calls: Sequence[StepCall]) -> StepCalls:
    """Steps of one owner, of as many time steps each and with one deadline, as a message brings them."""
    return StepCalls(
        principal=calls[0].key.principal,
        session_ids=[call.key.session_id for call in calls],
        positions=[call.position for call in calls],
        inputs=np.stack([call.inputs for call in calls]),
        digests=Digests(np.stack([call.inputs for call in calls])),
        deadline=calls[0].deadline,
        caller=calls[0].caller,
        names=[call.key.session_id for call in calls],
    )


def version_of(name: str = "sums", version: int = 1, fingerprint: str = "f1") -> ModelVersion:
    return ModelVersion(
        key=VersionKey(name, version),
        fingerprint=fingerprint,
        input_dim=INPUT_DIM,
        output_dim=OUTPUT_DIM,
        state_size=STATE_SIZE,
        state_layout=(
            StateComponent("average", (2,), 0, ("channel",)),
            StateComponent("alternating", (1,), 2),
            StateComponent("counters", (1, 2), 3),
        ),
        keras_config_json="{}",
        task="sums",
    )


class NumpyExecutor:
    """Runs the test model; ``gate`` holds its calls, ``fault`` stands in for what a model can do wrong."""

    def __init__(self, *versions: ModelVersion, max_in_flight: int = 1) -> None:
        self.max_in_flight = max_in_flight
        self.max_rows = None
        self.served = {version.key: version for version in versions or (version_of(),)}
        self.told: dict[VersionKey, VersionStatus] = {}
        self.released: list[VersionKey] = []
        self.batches: MutableSequence[StepBatch] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.entered = asyncio.Event()
        self.fault: Any = None
        self.closed = False

    def hold(self) -> None:
        """Calls wait from now on, until ``gate`` is set; ``entered`` tells when one does."""
        self.gate.clear()
        self.entered.clear()

    async def start(self) -> None: ...

    def versions(self) -> Mapping[VersionKey, ModelVersion]:
        return self.served

    def newest(self, model: str) -> VersionKey | None:
        return max((key for key in self.served if key.model == model), default=None)

    def statuses(self) -> Mapping[VersionKey, VersionStatus]:
        return self.told

    async def release(self, key: VersionKey) -> None:
        self.released.append(key)

    def bucket(self, rows: int, steps: int) -> tuple[int, int]:
        return 1 << (rows - 1).bit_length(), steps

    async def step(self, key: VersionKey, batch: StepBatch) -> StepBatchResult:
        if key not in self.served:
            raise ModelVersionUnavailable(f"{key} is gone")
        self.batches.append(batch)
        self.entered.set()
        await asyncio.sleep(0)
        await self.gate.wait()
        if self.fault is not None:
            result = self.fault(batch)
            if result is not None:
                return result
        return compute(batch)

    async def close(self) -> None:
        self.closed = True


def compute(batch: StepBatch) -> StepBatchResult:
    outputs = np.zeros((*batch.inputs.shape[:2], OUTPUT_DIM), np.float32)
    state = batch.state.copy()
    for row, length in enumerate(batch.lengths):
        begin = initial_state() if batch.reset[row] else state[row]
        outputs[row, :length], state[row] = run_whole(batch.inputs[row, :length], begin)
    return StepBatchResult(outputs, state)


class Running:
    """A gateway that listens, and stubs to talk to it."""

    def __init__(self, gateway: Gateway, executor: Any, port: int, channel: grpc.aio.Channel) -> None:
        self.gateway = gateway
        self.executor = executor
        self.port = port
        self.channel = channel
        self.stub = sequence_service_pb2_grpc.SequenceServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.port}"

    async def create(self, session_id: str, model: str = "sums") -> pb.Session:
        request = pb.CreateSessionRequest(session_id=session_id, model=pb.ModelSpec(name=model))
        return await self.stub.CreateSession(request)


@asynccontextmanager
async def running_gateway(
    executor: Executor | None = None, store: SessionStore | None = None, tracing: Any = None, **settings: Any
) -> AsyncIterator[Running]:
    """A gateway around ``executor`` on a free port of loopback; drained at the end."""
    executor = executor or NumpyExecutor()
    store = store or MemoryStore(max_sessions=1000, clock=time.time)
    options = {"model_dir": Path(), "listen": "127.0.0.1:0", "drain_timeout": 5, **settings}
    gateway = Gateway(Settings(**options), executor=executor, store=store, tracing=tracing)
    port = await gateway.listen()
    await gateway.open()
    unlimited = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", unlimited) as channel:
            yield Running(gateway, executor, port, channel)
    finally:
        await gateway.drain()


def step_request(
    session_id: str, inputs: FloatArray, position: int | None = None, request_id: str = "", timeout: float | None = None
) -> pb.StepRequest:
    request = pb.StepRequest(
        request_id=request_id, session_id=session_id, position=position, inputs=render_tensor(inputs)
    )
    if timeout is not None:
        request.timeout.FromNanoseconds(int(timeout * 1e9))
    return request


def outputs_of(response: pb.StepResponse) -> FloatArray:
    return np.frombuffer(response.outputs.content, np.float32).reshape(tuple(response.outputs.shape))


def random_inputs(time_steps: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(size=(time_steps, INPUT_DIM)).astype(np.float32)
