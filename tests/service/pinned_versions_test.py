"""The version that a session is pinned to: which one, and what becomes of it when that is not here."""

import asyncio

import numpy as np
import pytest

from service.errors import FingerprintMismatch, ModelVersionUnavailable
from service.types import SessionKey
from tests.service.benches import KEY, Bench
from tests.service.support import NumpyExecutor, random_inputs, run_whole, version_of


async def test_new_sessions_get_the_newest_version_and_old_ones_stay():
    executor = NumpyExecutor(version_of(version=1, fingerprint="one"))
    async with Bench(executor) as bench:
        await bench.create()
        newer = version_of(version=2, fingerprint="two")
        executor.served[newer.key] = newer
        assert (await bench.create(SessionKey("p", "b"))).info.version == newer.key
        assert (await bench.create(SessionKey("p", "c"), version=1)).info.version.version == 1
        await bench.step(random_inputs(1), 0)
        assert (await bench.engine.sessions.get(KEY)).info.version.version == 1
        assert await bench.engine.session_counts() == {version_of(version=1).key: 2, newer.key: 1}


async def test_a_session_whose_version_went_away_is_kept():
    executor = NumpyExecutor()
    async with Bench(executor) as bench:
        await bench.create()
        await bench.step(random_inputs(1), 0)
        version = executor.served.pop(version_of().key)
        with pytest.raises(ModelVersionUnavailable):
            await bench.step(random_inputs(1), 1)
        executor.served[version.key] = version_of(fingerprint="other")
        with pytest.raises(FingerprintMismatch):
            await bench.step(random_inputs(1), 1)
        executor.served[version.key] = version
        assert (await bench.step(random_inputs(1), 1)).position == 2


async def test_a_version_that_another_gateway_saw_first_is_waited_for():
    """While it is rolled out: the session is on the new version, and its step comes to a gateway that has to look."""
    newer = version_of(version=2, fingerprint="two")
    executor = NumpyExecutor()
    async with Bench(NumpyExecutor(newer)) as first, Bench(executor, store=first.store) as second:
        await first.create()
        inputs = random_inputs(2)
        step = asyncio.create_task(second.step(inputs, 0))
        inspected = asyncio.create_task(second.engine.sessions.inspect(KEY))
        await asyncio.sleep(0)
        assert not step.done()
        executor.served[newer.key] = newer
        np.testing.assert_array_equal((await step).outputs, run_whole(inputs)[0])
        assert (await inspected).session.info.version == newer.key
        del executor.served[newer.key]
        with pytest.raises(ModelVersionUnavailable):  # it was here: now it is gone
            await second.step(random_inputs(1), 2)


async def test_a_version_that_never_comes_is_waited_for_once():
    newer = version_of(version=2, fingerprint="two")
    async with Bench(NumpyExecutor(newer)) as first, Bench(store=first.store) as second:
        await first.create()
        second.engine.catalog.patience = 0.1
        with pytest.raises(ModelVersionUnavailable):
            await second.step(random_inputs(1), 0)
        second.engine.catalog.patience = 1000  # longer than the step's own limit
        with pytest.raises(ModelVersionUnavailable):
            await second.step(random_inputs(1), 0)
