"""Sessions from create to delete or expiry, with the engine's steps in between."""

import asyncio

import numpy as np
import pytest

from service.errors import ModelNotFound, SessionExists, SessionLimit, SessionNotFound
from service.types import SessionKey
from tests.service.benches import KEY, Bench
from tests.service.support import initial_state, random_inputs, run_whole


async def test_create_is_safe_to_repeat_and_never_takes_over():
    async with Bench() as bench:
        first = await bench.create()
        await bench.step(random_inputs(3), 0)
        assert (await bench.create()).info == first.info
        assert (await bench.create()).position == 3
        with pytest.raises(SessionExists):
            await bench.create(ttl=61.0)
        with pytest.raises(SessionExists):
            await bench.create(version=1)
        other = await bench.create(SessionKey("q", "a"))
        assert other.position == 0


async def test_unknown_models_versions_and_sessions():
    async with Bench() as bench:
        with pytest.raises(ModelNotFound):
            await bench.create(model="nope")
        with pytest.raises(ModelNotFound, match="served: 1"):
            await bench.create(version=2)
        for use in (
            bench.step(random_inputs(1), 0),
            bench.engine.sessions.get(KEY),
            bench.engine.sessions.inspect(KEY),
        ):
            with pytest.raises(SessionNotFound):
                await use
        await bench.engine.sessions.delete(KEY)


async def test_a_deleted_session_is_not_committed_to():
    async with Bench() as bench:
        await bench.create()
        bench.executor.hold()
        task = asyncio.create_task(bench.step(random_inputs(1), 0))
        await bench.executor.entered.wait()
        await bench.engine.sessions.delete(KEY)
        bench.executor.gate.set()
        with pytest.raises(SessionNotFound):
            await task
        with pytest.raises(SessionNotFound):
            await bench.engine.sessions.get(KEY)


async def test_a_session_deleted_and_made_again_while_a_step_ran_does_not_get_its_state():
    async with Bench() as bench:
        await bench.create()
        bench.executor.hold()
        inputs = random_inputs(3)
        task = asyncio.create_task(bench.step(inputs, 0))
        await bench.executor.entered.wait()
        await bench.engine.sessions.delete(KEY)
        await bench.create()
        bench.executor.gate.set()
        # The position fits the new session, its history does not: the step is run again, on the new one's state.
        reply = await task
        np.testing.assert_array_equal(reply.outputs, run_whole(inputs)[0])
        assert len(bench.executor.batches) == 2


async def test_sessions_expire_and_each_commit_renews_them():
    async with Bench(max_sessions=1) as bench:
        await bench.create(ttl=60)
        bench.store_clock.now += 40
        await bench.step(random_inputs(1), 0)
        bench.store_clock.now += 59
        await bench.engine.sessions.get(KEY)
        with pytest.raises(SessionLimit):
            await bench.create(SessionKey("p", "b"))
        bench.store_clock.now += 1
        with pytest.raises(SessionNotFound):
            await bench.step(random_inputs(1), 1)
        await bench.create(SessionKey("p", "b"))


async def test_a_session_does_not_expire_under_a_step_that_runs():
    async with Bench() as bench:
        await bench.create(ttl=1)
        bench.executor.hold()
        task = asyncio.create_task(bench.step(random_inputs(1), 0, limit=10))
        await bench.executor.entered.wait()
        bench.store_clock.now += 9
        await bench.store.sweep()
        bench.executor.gate.set()
        assert (await task).position == 1


async def test_inspect_names_the_parts_of_the_last_commit():
    async with Bench() as bench:
        await bench.create()
        fresh = await bench.engine.sessions.inspect(KEY)
        np.testing.assert_array_equal(fresh.components["average"], initial_state()[:2])
        inputs = random_inputs(5)
        await bench.step(inputs, 0)
        inspected = await bench.engine.sessions.inspect(KEY)
        state = run_whole(inputs)[1]
        np.testing.assert_array_equal(inspected.components["average"], state[:2])
        np.testing.assert_array_equal(inspected.components["counters"], state[3:].reshape(1, 2))
        assert inspected.session.position == 5
