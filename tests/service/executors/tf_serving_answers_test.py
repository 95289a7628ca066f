"""What the TensorFlow Serving executor makes of answers, errors and silence: against a model server that gives any."""

import asyncio
import contextlib
from typing import Any

import grpc
import numpy as np
import pytest

from service.errors import BadModelOutput, ExecutorUnavailable, ModelLoadError, ModelVersionUnavailable
from service.types import VersionKey
from tests.service.executors.fake_model_server import FakeModelServer, reply, running
from tests.service.executors.sequence_models import random_batch
from tests.service.executors.tf_serving import ONE, executor_of


def sent(request: Any, name: str) -> Any:
    tensor = request.inputs[name]
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    return np.frombuffer(tensor.tensor_content, np.float32).reshape(shape)


def honest(request: Any) -> Any:
    return reply(request, outputs=sent(request, "inputs"), state=sent(request, "state"))


def _wrong_rank(request: Any) -> Any:
    return reply(request, outputs=sent(request, "inputs")[:, 0], state=sent(request, "state"))


def _wrong_rows(request: Any) -> Any:
    return reply(request, outputs=sent(request, "inputs"), state=sent(request, "state")[:-1])


def _missing(request: Any) -> Any:
    return reply(request, outputs=sent(request, "inputs"))


def _other_dtype(request: Any) -> Any:
    response = honest(request)
    response.outputs["state"].dtype = 2
    return response


def _unknown_dtype(request: Any) -> Any:
    response = honest(request)
    response.outputs["state"].dtype = 77
    return response


def _too_few_values(request: Any) -> Any:
    response = honest(request)
    del response.outputs["state"].float_val[1:]
    return response


def _torn_content(request: Any) -> Any:
    response = honest(request)
    response.outputs["state"].tensor_content = b"\0\0\0"
    return response


def _other_version(request: Any) -> Any:
    response = honest(request)
    response.model_spec.version.value = 7
    return response


@pytest.mark.parametrize(
    "garble",
    [
        _wrong_rank,
        _wrong_rows,
        _missing,
        _other_dtype,
        _unknown_dtype,
        _too_few_values,
        _torn_content,
        _other_version,
        lambda request: b"\xff\xff\xff\xff",
        lambda request: b"",
    ],
)
async def test_nonsense_is_bad_model_output(garble: Any) -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        garbled = garble(request)
        return garbled if isinstance(garbled, bytes) else garbled.SerializeToString()

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        with pytest.raises(BadModelOutput):
            await executor.step(ONE, random_batch(3, 2))
        assert fake.steps == 1  # it is not asked again: the answer would be the same
        garble = honest
        await executor.step(ONE, random_batch(3, 2))


@pytest.mark.parametrize(
    ("code", "error", "retried"),
    [
        (grpc.StatusCode.UNAVAILABLE, None, True),
        (grpc.StatusCode.NOT_FOUND, None, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, True),
        (grpc.StatusCode.INVALID_ARGUMENT, BadModelOutput, False),
        (grpc.StatusCode.INTERNAL, BadModelOutput, False),
        (grpc.StatusCode.FAILED_PRECONDITION, BadModelOutput, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ExecutorUnavailable, False),
        (grpc.StatusCode.PERMISSION_DENIED, ExecutorUnavailable, False),
        (grpc.StatusCode.UNIMPLEMENTED, ExecutorUnavailable, False),
    ],
)
async def test_what_each_status_means(code: grpc.StatusCode, error: type[Exception] | None, retried: bool) -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        if fake.steps <= 3:
            await context.abort(code, "secret text of the model server")
        return honest(request).SerializeToString()

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        batch = random_batch(3, 2)
        if retried:
            np.testing.assert_array_equal((await executor.step(ONE, batch)).state, batch.state)
            assert fake.steps == 4
        else:
            with pytest.raises(error or Exception) as raised:
                await executor.step(ONE, batch)
            assert fake.steps == 1
            assert "secret" not in str(raised.value)  # clients see this message


async def test_a_busy_model_server_is_waited_for_until_the_time_limit() -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
        raise AssertionError

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}", timeout=0.5) as executor:
        with pytest.raises(ExecutorUnavailable, match=r"no model server answered for sums/1 within 0\.5 s"):
            await executor.step(ONE, random_batch(1, 1))
        assert 3 < fake.steps < 50  # it is asked ever more seldom


async def test_a_model_server_that_does_not_answer_is_given_up_at_the_time_limit() -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}", timeout=0.2) as executor:
        with pytest.raises(ExecutorUnavailable, match=r"no model server answered for sums/1 within 0\.2 s"):
            await executor.step(ONE, random_batch(1, 1))
        assert fake.steps == 1


async def test_a_model_server_that_is_away_is_waited_for_no_longer_than_the_time_limit() -> None:
    async with contextlib.AsyncExitStack() as server:
        port = await server.enter_async_context(running(FakeModelServer()))
        async with executor_of(f"127.0.0.1:{port}", timeout=0.3, patience=60.0) as executor:
            await server.aclose()
            async with asyncio.timeout(30):
                with pytest.raises(ExecutorUnavailable, match=r"no model server answered for sums/1 within 0\.3 s"):
                    await executor.step(ONE, random_batch(1, 1))


async def test_a_cancelled_step_is_cancelled_at_the_model_server_too() -> None:
    fake = FakeModelServer()
    arrived, cancelled = asyncio.Event(), asyncio.Event()

    async def answer(request: Any, context: Any) -> bytes:
        arrived.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        step = asyncio.create_task(executor.step(ONE, random_batch(1, 1)))
        await arrived.wait()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        async with asyncio.timeout(5):
            await cancelled.wait()


async def test_close_waits_for_steps_under_way_and_may_be_called_twice() -> None:
    fake = FakeModelServer()
    arrived, go = asyncio.Event(), asyncio.Event()

    async def answer(request: Any, context: Any) -> bytes:
        arrived.set()
        await go.wait()
        return honest(request).SerializeToString()

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        step = asyncio.create_task(executor.step(ONE, random_batch(1, 1)))
        await arrived.wait()
        closing = asyncio.create_task(executor.close())
        await asyncio.sleep(0)
        assert not closing.done()
        go.set()
        await step
        await closing


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"fingerprint": "f", "input_dim": 0, "output_dim": 1, "state_layout": []}',
        b'{"fingerprint": "f", "input_dim": 1, "output_dim": 1, "state_size": 2, "state_layout": '
        b'[{"name": "a", "shape": [2], "offset": 1}]}',
        b'{"fingerprint": "f", "input_dim": 1, "output_dim": 1, "state_size": 3, "state_layout": '
        b'[{"name": "a", "shape": [2], "offset": 0}]}',
        b'{"fingerprint": "f", "input_dim": true, "output_dim": 1, "state_size": 2, "state_layout": '
        b'[{"name": "a", "shape": [2], "offset": 0}]}',
    ],
)
async def test_a_model_that_describes_itself_wrongly_is_not_served(text: bytes) -> None:
    fake = FakeModelServer()
    fake.text = text
    async with running(fake) as port:
        with pytest.raises(ModelLoadError, match=r"sums/1: its .*"):
            async with executor_of(f"127.0.0.1:{port}", start_timeout=0.3):
                pass


async def test_start_says_what_was_looked_for_and_where() -> None:
    with pytest.raises(ModelLoadError, match=r"no version of sums .*127\.0\.0\.1:1: UNAVAILABLE"):
        async with executor_of("127.0.0.1:1", start_timeout=0.3):
            pass
    fake = FakeModelServer("other")
    async with running(fake) as port:
        with pytest.raises(ModelLoadError, match=rf"no version of sums .*127\.0\.0\.1:{port}: sums: not served"):
            async with executor_of(f"127.0.0.1:{port}", start_timeout=0.3):
                pass
    with pytest.raises(ModelLoadError, match=r"no address was found for dns:///name\.invalid:8500"):
        async with executor_of("dns:///name.invalid:8500", start_timeout=0.3):
            pass


async def test_unknown_versions_are_refused_at_once() -> None:
    async with running(FakeModelServer()) as port, executor_of(f"127.0.0.1:{port}") as executor:
        with pytest.raises(ModelVersionUnavailable):
            await executor.step(VersionKey("sums", 9), random_batch(1, 1))
