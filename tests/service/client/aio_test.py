# The tests wait for what happens on their own event loop and has no event: they let it run until it has happened.
# ruff: noqa: ASYNC110
"""What only the asyncio client has: tasks, ``async with``, and one event loop."""

import asyncio

import numpy as np
import pytest

from service.client import AsyncSequenceClient, GatewayError, PrecedingStepFailed, SessionNotFound
from tests.service.support import random_inputs, run_whole, running_gateway


@pytest.fixture
async def running():
    async with running_gateway() as running:
        yield running


@pytest.fixture
async def client(running):
    async with AsyncSequenceClient(running.target, timeout=20) as client:
        yield client


async def test_async_with_opens_and_deletes(client):
    async with client.session("sums") as session:
        assert (await session.step(random_inputs(3))).shape == (3, 3)
    with pytest.raises(SessionNotFound):
        await client.attach(session.session_id)


async def test_async_with_on_an_attached_session_leaves_it_be(client):
    session = await client.create_session("sums")
    async with await client.attach(session.session_id) as attached:
        await attached.step(random_inputs(1))
    assert (await client.attach(session.session_id)).position == 1


async def test_gathered_steps_of_many_sessions_are_one_batch(client, running):
    sessions = [await client.session("sums") for _ in range(30)]
    await asyncio.gather(*(session.step(random_inputs(1)) for session in sessions))
    before = len(running.executor.batches)
    outputs = await asyncio.gather(*(session.step(random_inputs(1)) for session in sessions))
    assert len(running.executor.batches) - before == 1
    assert {int(y[0, 2]) for y in outputs} == {2}


async def test_gathered_steps_of_one_session_run_in_order(client):
    session = await client.session("sums")
    inputs = random_inputs(10)
    outputs = await asyncio.gather(*(session.step(inputs[n : n + 1]) for n in range(10)))
    np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])


async def test_gathered_steps_behind_a_failed_one_fail(client):
    session = await client.session("sums")
    bad, behind = await asyncio.gather(
        session.step(np.zeros((1, 9))), session.step(random_inputs(1)), return_exceptions=True
    )
    assert isinstance(bad, GatewayError)
    assert isinstance(behind, PrecedingStepFailed)
    assert session.position == 0


async def test_a_cancelled_task_gives_its_step_up(client, running):
    session = await client.session("sums")
    running.executor.gate.clear()
    task = asyncio.create_task(session.step(random_inputs(2)))
    while not running.executor.batches:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    running.executor.gate.set()
    np.testing.assert_array_equal(await session.step(random_inputs(2)), run_whole(random_inputs(2))[0])
    assert (await session.info()).position == 2


async def test_a_task_cancelled_as_its_answer_comes_can_repeat_its_step(client):
    session = await client.session("sums")
    task = asyncio.create_task(session.step(random_inputs(2)))
    while session.position == 0:  # until the answer is here, and its task has not run yet
        await asyncio.sleep(0)
    assert not task.done()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert session.position == 0
    np.testing.assert_array_equal(await session.step(random_inputs(2)), run_whole(random_inputs(2))[0])
    assert (await session.info()).position == 2


async def test_wait_for_works_like_a_deadline(client, running):
    session = await client.session("sums")
    running.executor.gate.clear()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(session.step(random_inputs(2)), 0.05)
    running.executor.gate.set()
    assert (await session.step(random_inputs(2))).shape == (2, 3)


async def test_closing_leaves_no_task(running):
    before = asyncio.all_tasks()
    client = AsyncSequenceClient(running.target)
    await (await client.session("sums")).step(random_inputs(1))
    await client.close()
    await client.close()
    mine = {task for task in asyncio.all_tasks() - before if "service/client" in str(task.get_coro())}
    assert not mine


def test_a_client_is_made_on_a_running_loop():
    with pytest.raises(RuntimeError, match="no running event loop"):
        AsyncSequenceClient("127.0.0.1:1")
