"""Versions that come, go, break and return in the directory of a gateway that runs its models itself."""

import asyncio
import contextlib
import shutil
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import grpc
import numpy as np
import pytest

from ntm_serving.v1 import model_service_pb2 as model_pb
from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import ModelLoadError, ModelVersionUnavailable
from service.executors import embedded
from service.executors.embedded import EmbeddedExecutor
from service.types import VersionKey, VersionState
from tests.service.executors.sequence_models import WIDTH, assert_close, expected, export_sums, random_batch
from tests.service.support import Running, outputs_of, running_gateway, step_request

ONE, TWO = VersionKey("sums", 1), VersionKey("sums", 2)
LOADING, AVAILABLE, DRAINING, FAILED = (
    VersionState.LOADING,
    VersionState.AVAILABLE,
    VersionState.DRAINING,
    VersionState.FAILED,
)


def executor_on(models: Path) -> EmbeddedExecutor:
    return EmbeddedExecutor(models, compile=False, poll_interval=0.01, threads=1)


@contextlib.asynccontextmanager
async def started(models: Path) -> AsyncIterator[EmbeddedExecutor]:
    executor = executor_on(models)
    await executor.start()
    try:
        yield executor
    finally:
        await executor.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - the directory is looked at from time to time
            await asyncio.sleep(0.005)


def states(executor: EmbeddedExecutor) -> dict[VersionKey, VersionState]:
    return {key: status.state for key, status in executor.statuses().items()}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    export_sums(tmp_path)
    return tmp_path


async def test_a_new_version_is_taken_up_and_the_old_one_goes_on(models: Path) -> None:
    async with started(models) as executor:
        assert executor.newest("sums") == ONE
        export_sums(models, version=2, scale=2.0)
        await until(lambda: executor.newest("sums") == TWO)
        assert states(executor) == {ONE: AVAILABLE, TWO: AVAILABLE}
        batch = random_batch(3, 4)
        assert_close(await executor.step(ONE, batch), expected(batch))
        assert_close(await executor.step(TWO, batch), expected(batch, scale=2.0))


async def test_a_new_model_is_taken_up(models: Path) -> None:
    async with started(models) as executor:
        assert executor.newest("wide") is None
        export_sums(models, "wide", width=5)
        await until(lambda: executor.newest("wide") is not None)
        batch = random_batch(2, 2, width=5)
        assert_close(await executor.step(VersionKey("wide", 1), batch), expected(batch, width=5))


async def test_a_version_whose_directory_is_gone_drains_until_it_is_released(models: Path, tmp_path: Path) -> None:
    export_sums(models, version=2, scale=2.0)
    async with started(models) as executor:
        (models / "sums" / "2").rename(tmp_path / "aside")
        await until(lambda: states(executor)[TWO] is DRAINING)
        assert executor.newest("sums") == ONE
        batch = random_batch(2, 3)
        assert_close(await executor.step(TWO, batch), expected(batch, scale=2.0))
        (tmp_path / "aside").rename(models / "sums" / "2")
        await until(lambda: states(executor)[TWO] is AVAILABLE)
        await executor.release(TWO)  # it was asked for too late: the directory is back
        assert executor.newest("sums") == TWO
        shutil.rmtree(models / "sums" / "2")
        await until(lambda: states(executor)[TWO] is DRAINING)
        await executor.release(TWO)
        assert states(executor) == {ONE: AVAILABLE}
        with pytest.raises(ModelVersionUnavailable):
            await executor.step(TWO, batch)
        export_sums(models, version=2, scale=3.0)  # the number may be used again: no session is on the old one
        await until(lambda: executor.newest("sums") == TWO)
        assert_close(await executor.step(TWO, batch), expected(batch, scale=3.0))


async def test_the_last_version_of_a_model_is_served_on_when_the_directory_vanishes(models: Path) -> None:
    export_sums(models, version=2, scale=2.0)
    async with started(models) as executor:
        shutil.rmtree(models / "sums")
        await until(lambda: states(executor)[ONE] is DRAINING)
        assert states(executor) == {ONE: DRAINING, TWO: AVAILABLE}
        assert executor.newest("sums") == TWO


async def test_a_version_that_cannot_be_loaded_says_why_and_the_others_are_served(models: Path) -> None:
    async with started(models) as executor:
        broken = models / "sums" / "3"
        broken.mkdir()
        (broken / "saved_model.pb").write_bytes(b"this is none")
        await until(lambda: states(executor).get(VersionKey("sums", 3)) is FAILED)
        assert "sums/3 cannot be loaded" in executor.statuses()[VersionKey("sums", 3)].message
        assert executor.newest("sums") == ONE
        shutil.rmtree(broken)
        await until(lambda: states(executor) == {ONE: AVAILABLE})


async def test_a_version_that_changes_on_disk_is_served_as_it_was_loaded(
    models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with started(models) as executor:
        (models / "sums" / "1" / "saved_model.pb").write_bytes(b"something else")
        await until(lambda: "sums/1 has changed on disk" in caplog.text)
        batch = random_batch(2, 2)
        assert_close(await executor.step(ONE, batch), expected(batch))


async def test_names_that_are_no_models_are_not_looked_into(models: Path) -> None:
    for name in (".sums", "a model", "x" * 65):
        export_sums(models, "sums", version=9).rename(models / "aside")
        (models / name).mkdir()
        (models / "aside").rename(models / name / "1")
    export_sums(models, version=9).rename(models / "sums" / "09")
    async with started(models) as executor:
        assert set(executor.versions()) == {ONE}


async def test_a_directory_of_which_nothing_can_be_served_is_no_start(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model in"):
        await executor_on(tmp_path).start()
    (tmp_path / "broken" / "1").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "saved_model.pb").write_bytes(b"")
    with pytest.raises(ModelLoadError, match="broken/1 cannot be loaded"):
        await executor_on(tmp_path).start()


async def listed(running: Running) -> dict[int, tuple[str, int]]:
    model = await running.models.GetModel(model_pb.GetModelRequest(name="sums"))
    names = model_pb.ModelVersion.State.Name
    return {v.version: (names(v.state).removeprefix("STATE_"), v.session_count) for v in model.versions}


async def open_session(running: Running, name: str, version: int | None = None) -> pb.Session:
    spec = pb.ModelSpec(name="sums", version=version)
    return await running.stub.CreateSession(pb.CreateSessionRequest(session_id=name, model=spec))


async def test_a_session_stays_on_its_version_through_a_roll_and_a_roll_back(models: Path) -> None:
    """Also when the version's directory goes: it is let go with its last session, and not before."""
    executor = executor_on(models)
    inputs = np.random.default_rng(0).normal(size=(4, WIDTH)).astype(np.float32)
    async with running_gateway(executor) as running:
        engine = running.gateway.engine
        await open_session(running, "old")
        export_sums(models, version=2, scale=2.0)
        await until(lambda: executor.newest("sums") == TWO)
        assert (await open_session(running, "new")).model.version == 2
        shutil.rmtree(models / "sums" / "2")  # rolled back
        await until(lambda: states(executor)[TWO] is DRAINING)
        await engine.mind_versions()
        assert await listed(running) == {2: ("DRAINING", 1), 1: ("AVAILABLE", 1)}
        assert (await open_session(running, "newer")).model.version == 1
        with pytest.raises(grpc.aio.AioRpcError, match="takes no new sessions on version 2"):
            await open_session(running, "newest", 2)
        for begin in range(4):  # both go on, each on its own
            for name, scale in (("old", 1.0), ("new", 2.0)):
                reply = await running.stub.Step(step_request(name, inputs[begin : begin + 1], begin))
                np.testing.assert_allclose(outputs_of(reply)[0], scale * inputs[: begin + 1].sum(axis=0), atol=1e-5)
        await running.stub.DeleteSession(pb.DeleteSessionRequest(session_id="new"))
        await engine.mind_versions()
        assert await listed(running) == {1: ("AVAILABLE", 2)}


async def test_a_model_that_hangs_stalls_no_other_and_not_the_end(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_sums(models, "slow")
    monkeypatch.setattr(embedded, "_PATIENCE_S", 0.1)
    executor = executor_on(models)
    await executor.start()
    hangs = threading.Event()
    slow = VersionKey("slow", 1)
    monkeypatch.setattr(executor._models[slow], "run", lambda batch: hangs.wait(60) and None)
    stuck = [asyncio.create_task(executor.step(slow, random_batch(1, 1))) for _ in range(4)]
    batch = random_batch(3, 4)
    assert_close(await executor.step(ONE, batch), expected(batch))
    await executor.close()
    hangs.set()
    await asyncio.gather(*stuck, return_exceptions=True)
