"""What the gateway's own Python costs a step: messages through servicer, engine, batcher and store, and back.

``python benchmarks/gateway_cpu.py --sessions 64 --steps 1``

No sockets, no model and no other process: an executor that answers zeros at once, and clients (``--streams``) that hand
over parsed messages of ``--sessions`` steps, as columns or (``--requests``) one by one, and parse the responses.
CPU microseconds a step, the median of some rounds.
"""

import argparse
import asyncio
import gc
import statistics
import time

import numpy as np
import uvloop

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import tensor_pb2
from service.admission import Admission
from service.batcher import Batcher, BatchPolicy
from service.engine import Engine
from service.identity import ANONYMOUS, set_caller
from service.limits import Limits
from service.logs import RequestLog
from service.lone import StreamMessages
from service.metrics import Metrics
from service.seal import Sealer
from service.servicer import SequenceServicer
from service.sessions.memory import MemoryStore
from service.stepping import Stepping
from service.types import ModelVersion, StateComponent, StepBatchResult, VersionKey, VersionState, VersionStatus

INPUT_DIM, OUTPUT_DIM, STATE_SIZE = 10, 8, 3036
VERSION = ModelVersion(
    key=VersionKey("zeros", 1),
    fingerprint="zeros",
    input_dim=INPUT_DIM,
    output_dim=OUTPUT_DIM,
    state_size=STATE_SIZE,
    state_layout=(StateComponent("state", (STATE_SIZE,), 0),),
)


class Zeros:
    """An executor that costs nothing."""

    max_in_flight = 2
    ahead = 2
    max_rows = 64

    def __init__(self):
        self._results = {}

    async def start(self):
        pass

    def versions(self):
        return {VERSION.key: VERSION}

    def newest(self, model):
        return VERSION.key if model == VERSION.key.model else None

    def statuses(self):
        return {VERSION.key: VersionStatus(VersionState.AVAILABLE)}

    def bucket(self, rows, steps):
        return rows, steps

    def begin(self, key, batch, *, company=False):
        shape = batch.inputs.shape[:2]
        if shape not in self._results:
            outputs, state = np.zeros((*shape, OUTPUT_DIM), np.float32), np.zeros((shape[0], STATE_SIZE), np.float32)
            # As the embedded executor says of what it answers: seen to be finite, and of use to it as it is.
            self._results[shape] = StepBatchResult(outputs, state, finite=True, native=state)
        running = asyncio.get_running_loop().create_future()
        running.set_result(self._results[shape])
        return running

    async def step(self, key, batch):
        return await self.begin(key, batch)

    async def close(self):
        pass


class Context:
    """As much of a call's context as a stream needs."""

    def time_remaining(self):
        return None


def make():
    """A servicer over an engine with sessions in memory."""
    from prometheus_client import CollectorRegistry

    executor, clock, metrics = Zeros(), asyncio.get_running_loop().time, Metrics(CollectorRegistry())
    policy = BatchPolicy(max_batch_size=64, max_steps_per_turn=16, executor_timeout=30.0)
    engine = Engine(
        store=MemoryStore(max_sessions=100_000, clock=time.time),
        executor=executor,
        batcher=Batcher(executor, policy=policy, clock=clock, observer=metrics),
        admission=Admission(max_steps=10_000, max_bytes=1 << 30),
        clock=clock,
        observer=metrics,
    )
    limits = Limits(
        max_chunk_bytes=1 << 22,
        max_stream_steps=1024,
        step_timeout=60.0,
        session_ttl=3600.0,
        max_session_ttl=3600.0,
    )
    stepping = Stepping(engine, limits, metrics, RequestLog(0.0))
    return engine, SequenceServicer(engine, stepping, limits, Sealer(bytes(32)))


class Client:
    """A stream with sessions of its own, which it steps all at once, over and over."""

    def __init__(self, servicer, number, sessions, steps, columns):
        self._servicer = servicer
        self._columns = columns
        self._names = [f"{number:016x}{session:016x}" for session in range(sessions)]
        self._asked = asyncio.Queue()
        self._responses = None
        self._parse = StreamMessages().parse
        self._position, self._steps = 0, steps
        self._tensor = tensor_pb2.Tensor(
            dtype=tensor_pb2.DATA_TYPE_FLOAT32, shape=(steps, INPUT_DIM), content=bytes(4 * steps * INPUT_DIM)
        )

    async def open(self):
        for name in self._names:
            model = pb.ModelSpec(name=VERSION.key.model)
            await self._servicer.CreateSession(pb.CreateSessionRequest(session_id=name, model=model), Context())
        self._responses = self._servicer.StreamSteps(self._messages(), Context())

    async def _messages(self):
        while (message := await self._asked.get()) is not None:
            yield message

    def message(self):
        """The next, as its bytes."""
        message = pb.StreamStepsRequest()
        if self._columns:
            self._add_columns(message.columns.add())
        else:
            self._add_requests(message.requests)
        self._position += self._steps
        return message.SerializeToString()

    def _add_requests(self, requests):
        for number, name in enumerate(self._names):
            request = requests.add(request_id=str(number), session_id=name, position=self._position)
            request.inputs.CopyFrom(self._tensor)
            request.timeout.seconds = 59

    def _add_columns(self, columns):
        columns.request_ids.extend(map(str, range(len(self._names))))
        columns.session_ids.extend(self._names)
        columns.positions.extend([self._position] * len(self._names))
        columns.inputs.CopyFrom(self._tensor)
        columns.inputs.shape.insert(0, len(self._names))
        columns.inputs.content *= len(self._names)
        columns.timeout.seconds = 59

    async def run(self, messages):
        for message in messages:
            self._asked.put_nowait(self._parse(message))
            left = len(self._names)
            while left:
                response = pb.StreamStepsResponse.FromString(await anext(self._responses))
                left -= len(response.responses) + sum(len(results.positions) for results in response.columns)
                if response.responses and response.responses[0].HasField("status"):
                    raise SystemExit(str(response.responses[0].status))

    async def close(self):
        self._asked.put_nowait(None)
        async for _ in self._responses:
            pass


async def measure(options):
    engine, servicer = make()
    await engine.start()
    set_caller(lambda: ANONYMOUS, "client")
    load = (options.sessions, options.steps, not options.requests)
    clients = [Client(servicer, number, *load) for number in range(options.streams)]
    for client in clients:
        await client.open()
    costs = []
    for _ in range(options.rounds):
        ready = [[client.message() for _ in range(options.messages)] for client in clients]
        began = time.process_time()
        await asyncio.gather(*(client.run(messages) for client, messages in zip(clients, ready, strict=True)))
        steps = options.messages * options.sessions * options.streams
        costs.append(1e6 * (time.process_time() - began) / steps)
    for client in clients:
        await client.close()
    await engine.close()
    return statistics.median(costs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=64, help="steps of a message (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=1, help="time steps of a step (default: %(default)s)")
    parser.add_argument("--streams", type=int, default=1, help="at once (default: %(default)s)")
    parser.add_argument("--requests", action="store_true", help="not columns: a request for each step")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--messages", type=int, default=50, help="of a round (default: %(default)s)")
    options = parser.parse_args()
    gc.set_threshold(10_000, 20, 20)  # as the gateway does
    cost = uvloop.run(measure(options))
    print(
        f"{options.streams} streams, {options.sessions} steps of {options.steps} in a message: "
        f"{cost:.1f} us of CPU a step"
    )


if __name__ == "__main__":
    main()
