"""Which versions there are, in which state, with how many sessions; and what becomes of sessions without one."""

import contextlib
from collections.abc import AsyncIterator

import grpc
import pytest

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.executors.tf_serving import TfServingExecutor
from service.types import VersionKey, VersionState, VersionStatus
from tests.service.executors.fake_model_server import FakeModelServer
from tests.service.executors.fake_model_server import running as running_model_server
from tests.service.executors.tf_serving import until
from tests.service.support import NumpyExecutor, Running, random_inputs, running_gateway, step_request, version_of

ONE, TWO, THREE, FOUR = (VersionKey("sums", number) for number in (1, 2, 3, 4))


class Rolling(NumpyExecutor):
    """Has versions 1 and 2, of which new sessions get 1: 2 is not on every replica yet."""

    def __init__(self) -> None:
        super().__init__(version_of(version=1, fingerprint="one"), version_of(version=2, fingerprint="two"))
        self.newest_key: VersionKey | None = ONE

    def newest(self, model: str) -> VersionKey | None:
        return self.newest_key if model == "sums" else None


async def listed(running: Running, name: str = "sums") -> list[tuple[int, str, str, int]]:
    model = await running.models.GetModel(model_pb.GetModelRequest(name=name))
    state = model_pb.ModelVersion.State.Name
    return [
        (v.version, state(v.state).removeprefix("STATE_"), v.state_message, v.session_count) for v in model.versions
    ]


async def test_new_sessions_get_what_the_executor_calls_newest_or_the_version_that_they_ask_for() -> None:
    executor = Rolling()
    async with running_gateway(executor) as running:
        assert (await running.create("a")).model.version == 1
        ask = pb.CreateSessionRequest(session_id="b", model=pb.ModelSpec(name="sums", version=2))
        assert (await running.stub.CreateSession(ask)).model.version == 2
        executor.newest_key = TWO
        assert (await running.create("c")).model.version == 2


async def test_versions_that_cannot_be_stepped_are_listed_with_the_reason() -> None:
    executor = NumpyExecutor(version_of(version=1), version_of(version=2))
    executor.told = {
        TWO: VersionStatus(VersionState.DRAINING, "going"),
        THREE: VersionStatus(VersionState.FAILED, "broken"),
        FOUR: VersionStatus(VersionState.LOADING),
    }
    async with running_gateway(executor) as running:
        assert await listed(running) == [
            (4, "LOADING", "", 0),
            (3, "FAILED", "broken", 0),
            (2, "DRAINING", "going", 0),
            (1, "AVAILABLE", "", 0),
        ]


async def test_a_version_that_drains_is_released_with_its_last_session() -> None:
    executor = NumpyExecutor(version_of(version=1), version_of(version=2))
    async with running_gateway(executor) as running:
        engine = running.gateway.engine
        assert (await running.create("a")).model.version == 2
        executor.told = {TWO: VersionStatus(VersionState.DRAINING)}
        await engine.mind_versions()
        assert executor.released == []
        await running.stub.Step(step_request("a", random_inputs(2), 0))
        await running.stub.DeleteSession(pb.DeleteSessionRequest(session_id="a"))
        await engine.mind_versions()
        assert executor.released == [TWO]


async def test_sessions_whose_version_is_gone_are_told_of_and_kept(caplog: pytest.LogCaptureFixture) -> None:
    executor = NumpyExecutor(version_of(version=1), version_of(version=2))
    async with running_gateway(executor) as running:
        await running.create("a")
        gone = executor.served.pop(TWO)
        for _ in range(2):
            await running.gateway.engine.mind_versions()
        told = [record.getMessage() for record in caplog.records if "is not served" in record.getMessage()]
        assert told == ["1 sessions are pinned to sums/2, which is not served; they are kept"]
        message = "not served; its sessions are kept until it is back"
        assert await listed(running) == [(2, "UNAVAILABLE", message, 1), (1, "AVAILABLE", "", 0)]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await running.stub.Step(step_request("a", random_inputs(1), 0))
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        executor.served[TWO] = gone
        assert (await running.stub.Step(step_request("a", random_inputs(1), 0))).position == 1


@contextlib.asynccontextmanager
async def tf_serving(*servers: FakeModelServer) -> AsyncIterator[tuple[Running, TfServingExecutor]]:
    async with contextlib.AsyncExitStack() as stack:
        ports = [await stack.enter_async_context(running_model_server(server)) for server in servers]
        targets = ",".join(f"127.0.0.1:{port}" for port in ports)
        executor = TfServingExecutor(targets, models=["sums"], poll_interval=0.02, start_timeout=20.0)
        yield await stack.enter_async_context(running_gateway(executor)), executor


async def test_what_model_servers_say_of_their_versions_is_passed_on() -> None:
    server = FakeModelServer()
    server.fingerprints = {2: "two"}
    server.others = {1: (50, ""), 3: (50, "no space left"), 4: (20, ""), 5: (40, "")}
    async with tf_serving(server) as (running, _):
        assert await listed(running) == [
            (5, "DRAINING", "", 0),
            (4, "LOADING", "", 0),
            (3, "FAILED", "no space left", 0),
            (2, "AVAILABLE", "", 0),
        ]


async def test_a_version_gets_new_sessions_once_it_is_on_every_model_server() -> None:
    old, new = FakeModelServer(), FakeModelServer()
    old.fingerprints, new.fingerprints = {1: "one"}, {1: "one", 2: "two"}
    async with tf_serving(old, new) as (running, executor):
        await until(lambda: TWO in executor.versions())
        assert (await running.create("a")).model.version == 1
        assert (await listed(running))[0] == (2, "AVAILABLE", "on 1 of 2 model servers", 0)
        old.fingerprints = {1: "one", 2: "two"}
        await until(lambda: executor.newest("sums") == TWO)
        assert (await running.create("b")).model.version == 2
        assert [row[3] for row in await listed(running)] == [1, 1]
