"""A gateway's process is killed at each point of a step: sent again to another one, it gives what it would have given.

Two ``ntm-serve`` processes share a Valkey; the model server answers in this process, and proxies stand on the ways, so
that a test knows where a step is when it strikes.
"""

import asyncio
import contextlib

import grpc
import numpy as np
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc
from service.types import StepBatch
from tests.integration.processes import Gateway
from tests.service.executors.fake_model_server import FakeModelServer, reply, running
from tests.service.executors.sequence_models import WIDTH, expected
from tests.service.sessions.proxy import Proxy
from tests.service.sessions.valkey import Valkey, free_port
from tests.service.support import outputs_of, step_request

pytestmark = pytest.mark.slow

POINTS = ("before the model", "in the model", "before the commit", "late commit", "after the commit", "after the reply")


class Stage:
    """Everything, and where each thing can be stopped."""

    def __init__(self, folder):
        self.folder = folder
        self.valkey = Valkey(folder / "valkey", port=free_port())
        self.model = FakeModelServer()
        self.model.answer = self._answer
        self.in_model, self.may_answer, self.on_answer = asyncio.Event(), asyncio.Event(), lambda: None
        self.may_answer.set()

    async def start(self, stack):
        self.valkey.start()
        stack.callback(self.valkey.stop)
        model_port = await stack.enter_async_context(running(self.model))
        self.to_store = await Proxy(self.valkey.port).start()
        self.to_mortal = await Proxy(0).start()
        for proxy in (self.to_store, self.to_mortal):
            stack.push_async_callback(proxy.close)
        self.mortal = self._gateway(stack, "mortal", model_port, self.to_store.url)
        other = self._gateway(stack, "other", model_port, self.valkey.url)
        await asyncio.gather(self.revive(), self._serving(other))
        self.stubs = []
        for target in (f"127.0.0.1:{self.to_mortal.port}", other.target):
            options = [("grpc.initial_reconnect_backoff_ms", 100), ("grpc.max_reconnect_backoff_ms", 100)]
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(target, options))
            self.stubs.append(sequence_service_pb2_grpc.SequenceServiceStub(channel))
        return self

    def _gateway(self, stack, name, model_port, store):
        (self.folder / name).mkdir()
        serving = ("--tf-serving", f"127.0.0.1:{model_port}", "--model", "sums")
        # Nothing is given up here before it has died.
        patience = ("--store-timeout", "60", "--executor-timeout", "60")
        gateway = Gateway(self.folder / name, *serving, "--store", store, *patience)
        stack.push(gateway.__exit__)
        return gateway

    async def _serving(self, gateway):
        gateway.start()
        await asyncio.to_thread(gateway.wait_until_serving)

    async def revive(self):
        """A new process in place of the one that died."""
        self.to_store.pass_all()
        self.to_mortal.pass_all()
        await self._serving(self.mortal)
        self.to_mortal.target = int(self.mortal.target.rpartition(":")[2])

    async def _answer(self, request, context):
        batch = StepBatch(*(_array(request.inputs[name]) for name in ("inputs", "lengths", "reset", "state")))
        self.in_model.set()
        await self.may_answer.wait()
        self.on_answer()
        result = expected(batch)
        return reply(request, outputs=result.outputs, state=result.state).SerializeToString()

    def position(self, session_id):
        """Where the store has a session now."""
        (key,) = self.valkey.client.keys(f"ntm:session:*/{session_id}")
        return int(self.valkey.client.hget(key, "pos"))

    def trap(self, point):
        """Stops a step at ``point``; returns what is set once it is there."""
        self.in_model.clear()
        for proxy in (self.to_store, self.to_mortal):
            proxy.held.clear()
        if point == "before the model":
            self.to_store.requests.clear()
        elif point == "in the model":
            self.may_answer.clear()
            return self.in_model
        elif point in ("before the commit", "late commit"):
            self.on_answer = self.to_store.requests.clear
        elif point == "after the commit":
            self.on_answer = self.to_store.replies.clear
        else:
            self.on_answer = self.to_mortal.replies.clear
            return self.to_mortal.held
        return self.to_store.held

    async def kill_at(self, point, request):
        """Sends a step to the gateway that is to die, waits until it is at ``point``, and kills it."""
        at = self.trap(point)
        sent = asyncio.ensure_future(self.stubs[0].Step(request))
        await at.wait()
        self.mortal.kill()
        self.on_answer = lambda: None
        self.may_answer.set()
        self.to_mortal.cut()
        if point != "late commit":
            self.to_store.cut()
        with pytest.raises(grpc.aio.AioRpcError):
            await sent


def _array(tensor):
    kinds = {1: np.float32, 3: np.int32, 10: np.bool_}
    values = np.frombuffer(tensor.tensor_content, kinds[tensor.dtype])
    return values.reshape([dim.size for dim in tensor.tensor_shape.dim])


@pytest.fixture
async def stage(tmp_path):
    async with contextlib.AsyncExitStack() as stack:
        yield await Stage(tmp_path).start(stack)


async def test_a_gateway_that_dies_in_a_step(stage):
    for number, point in enumerate(POINTS):
        if number:
            await stage.revive()
        await die_at(stage, point, f"s{number}")


async def create(stub, session_id):
    request = pb.CreateSessionRequest(session_id=session_id, model=pb.ModelSpec(name="sums"))
    await stub.CreateSession(request, wait_for_ready=True)


async def die_at(stage, point, session_id):
    inputs = np.random.default_rng(7).integers(-50, 50, (12, WIDTH)).astype(np.float32)
    whole, other = inputs.cumsum(0), stage.stubs[1]
    # The gateway that is to die is connected to the store, and has no copy of the session: it has to ask for it.
    await create(stage.stubs[0], f"before-{session_id}")
    await stage.stubs[0].Step(step_request(f"before-{session_id}", inputs[:3], 0))
    await create(other, session_id)
    assert (await other.Step(step_request(session_id, inputs[:3], 0))).position == 3
    second = step_request(session_id, inputs[3:8], 3)
    await stage.kill_at(point, second)
    assert stage.position(session_id) == (8 if point in ("after the commit", "after the reply") else 3), point
    if point == "late commit":
        stage.to_store.requests.set()  # what the dead one sent arrives now, ahead of the same step or behind it
    answer = await other.Step(second)
    assert answer.position == 8, point
    np.testing.assert_array_equal(outputs_of(answer), whole[3:8], point)
    third = await other.Step(step_request(session_id, inputs[8:], 8))
    np.testing.assert_array_equal(outputs_of(third), whole[8:], point)
    state = await other.InspectSession(pb.InspectSessionRequest(session_id=session_id))
    assert state.session.position == 12, point
    assert state.state[0].value.content == whole[-1].astype("<f4").tobytes(), point
