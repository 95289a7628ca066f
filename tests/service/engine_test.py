import asyncio
import hashlib

import numpy as np
import pytest

from service.admission import Admission
from service.batcher import Batcher, BatchPolicy
from service.engine import Engine
from service.errors import (
    BadModelOutput,
    DeadlineExceeded,
    Draining,
    ExecutorUnavailable,
    FingerprintMismatch,
    InvalidTensor,
    ModelNotFound,
    ModelVersionUnavailable,
    Overloaded,
    PositionMismatch,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    StepConflict,
    StoreUnavailable,
)
from service.sessions.memory import MemoryStore
from service.types import SessionKey, StepBatchResult, StepCall
from tests.service.support import NumpyExecutor, compute, initial_state, random_inputs, run_whole, version_of

KEY = SessionKey("p", "a")


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


class Bench:
    """An engine over the test model, with a store whose clock is moved by hand."""

    def __init__(self, executor=None, *, max_sessions=10, max_steps=100, store=None):
        self.executor = executor or NumpyExecutor()
        self.store_clock = Clock()
        self.store = store or MemoryStore(max_sessions=max_sessions, clock=self.store_clock)
        loop_clock = asyncio.get_running_loop().time
        policy = BatchPolicy(max_batch_size=8, max_steps_per_turn=4, executor_timeout=10)
        self.engine = Engine(
            store=self.store,
            executor=self.executor,
            batcher=Batcher(self.executor, policy=policy, clock=loop_clock),
            admission=Admission(max_steps=max_steps, max_bytes=10**6),
            clock=loop_clock,
        )

    async def __aenter__(self):
        await self.engine.start()
        return self

    async def __aexit__(self, *_):
        await self.engine.close()

    def create(self, key=KEY, model="sums", version=None, ttl=60.0):
        return self.engine.sessions.create(key, model, version, ttl)

    def call(self, inputs, position, key=KEY, limit=10.0):
        deadline = asyncio.get_running_loop().time() + limit
        digest = hashlib.sha256(repr(inputs.shape).encode() + inputs.tobytes()).digest()
        return StepCall(key, position, inputs, digest, deadline)

    def step(self, inputs, position, **options):
        return self.engine.step(self.call(inputs, position, **options))


async def test_chunks_of_a_sequence_give_what_the_whole_gives():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(25)
        replies = [await bench.step(inputs[a:b], a) for a, b in [(0, 1), (1, 10), (10, 11), (11, 25)]]
        np.testing.assert_array_equal(np.concatenate([reply.outputs for reply in replies]), run_whole(inputs)[0])
        assert [reply.position for reply in replies] == [1, 10, 11, 25]


async def test_a_repeated_step_gets_the_same_reply_and_runs_once():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(6)
        await bench.step(inputs[:2], 0)
        first = await bench.step(inputs[2:4], 2)
        ran = len(bench.executor.batches)
        again = await bench.step(inputs[2:4].copy(), 2)
        assert len(bench.executor.batches) == ran
        assert again.position == first.position
        np.testing.assert_array_equal(again.outputs, first.outputs)
        after = await bench.step(inputs[4:], 4)
        np.testing.assert_array_equal(after.outputs, run_whole(inputs)[0][4:])


async def test_other_inputs_at_the_same_place_are_a_conflict():
    async with Bench() as bench:
        await bench.create()
        await bench.step(random_inputs(2), 0)
        with pytest.raises(StepConflict) as caught:
            await bench.step(random_inputs(2, seed=9), 0)
        assert caught.value.metadata == {"position": "2", "last_begin": "0"}


@pytest.mark.parametrize("position", [1, 3, 100])
async def test_any_other_position_is_a_mismatch_that_tells_where_the_session_stands(position):
    async with Bench() as bench:
        await bench.create()
        await bench.step(random_inputs(2), 0)
        with pytest.raises(PositionMismatch) as caught:
            await bench.step(random_inputs(2), position)
        assert caught.value.metadata == {"position": "2", "last_begin": "0"}
        assert (await bench.engine.sessions.get(KEY)).position == 2


async def test_a_fresh_session_has_nothing_to_replay():
    async with Bench() as bench:
        await bench.create()
        with pytest.raises(PositionMismatch) as caught:
            await bench.step(random_inputs(1), 5)
        assert caught.value.metadata == {"position": "0", "last_begin": ""}


async def test_without_a_position_a_step_applies_wherever_the_session_stands():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(4)
        await bench.step(inputs[:2], None)
        reply = await bench.step(inputs[2:], None)
        np.testing.assert_array_equal(reply.outputs, run_whole(inputs)[0][2:])


async def test_steps_of_one_session_wait_their_turn_in_order():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(9)
        tasks = [asyncio.create_task(bench.step(inputs[n : n + 3], n)) for n in (0, 3, 6)]
        replies = await asyncio.gather(*tasks)
        np.testing.assert_array_equal(np.concatenate([r.outputs for r in replies]), run_whole(inputs)[0])


async def test_a_failed_step_leaves_the_session_as_it_was():
    async with Bench() as bench:
        await bench.create()
        inputs = random_inputs(12)
        await bench.step(inputs[:2], 0)
        before = await bench.engine.sessions.get(KEY)

        def bad_on_the_second_slice(batch):
            good = compute(batch)
            if len(bench.executor.batches) == 3:
                return StepBatchResult(good.outputs * np.float32(np.nan), good.state)
            return good

        bench.executor.fault = bad_on_the_second_slice
        with pytest.raises(BadModelOutput):
            await bench.step(inputs[2:], 2)
        bench.executor.fault = None
        assert (await bench.engine.sessions.get(KEY)).token == before.token
        reply = await bench.step(inputs[2:], 2)
        np.testing.assert_array_equal(reply.outputs, run_whole(inputs)[0][2:])


async def test_a_time_limit_that_passes_leaves_the_session_as_it_was_and_frees_its_turn():
    async with Bench() as bench:
        await bench.create()
        bench.executor.hold()
        with pytest.raises(DeadlineExceeded):
            await bench.step(random_inputs(2), 0, limit=0.02)
        bench.executor.gate.set()
        reply = await bench.step(random_inputs(2), 0)
        np.testing.assert_array_equal(reply.outputs, run_whole(random_inputs(2))[0])


async def test_a_cancelled_step_frees_its_turn_and_its_permit():
    async with Bench(max_steps=1) as bench:
        await bench.create()
        bench.executor.hold()
        task = asyncio.create_task(bench.step(random_inputs(2), 0))
        await bench.executor.entered.wait()
        with pytest.raises(Overloaded):
            await bench.step(random_inputs(1), 2)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        bench.executor.gate.set()
        assert (await bench.step(random_inputs(2), 0)).position == 2


async def test_a_width_that_is_not_the_model_s_is_refused_and_named():
    async with Bench() as bench:
        await bench.create()
        with pytest.raises(InvalidTensor, match=r"\[1, 3\]; model sums/1 takes \[time, 2\]") as caught:
            await bench.step(np.zeros((1, 3), np.float32), 0)
        assert caught.value.field == "inputs.shape"
        assert (await bench.step(random_inputs(1), 0)).position == 1


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


async def test_draining_lets_steps_finish_and_takes_none():
    async with Bench() as bench:
        await bench.create()
        bench.executor.hold()
        task = asyncio.create_task(bench.step(random_inputs(1), 0))
        await bench.executor.entered.wait()
        assert not await bench.engine.drain(0.01)
        with pytest.raises(Draining):
            await bench.step(random_inputs(1), 1)
        with pytest.raises(Draining):
            await bench.create(SessionKey("p", "b"))
        bench.executor.gate.set()
        assert await bench.engine.drain(5)
        assert (await task).position == 1


async def test_before_the_models_are_there_everything_is_refused_for_now():
    bench = Bench()
    with pytest.raises(ExecutorUnavailable):
        await bench.create()
    with pytest.raises(ExecutorUnavailable):
        await bench.engine.models()


class Unreliable(MemoryStore):
    """Refuses a commit before it is written."""

    broken = False

    async def commit(self, key, commit):
        if self.broken:
            raise StoreUnavailable("down")
        return await super().commit(key, commit)


async def test_a_store_that_is_down_fails_the_step_and_keeps_the_session():
    store = Unreliable(max_sessions=10, clock=Clock())
    async with Bench(store=store) as bench:
        await bench.create()
        store.broken = True
        with pytest.raises(StoreUnavailable):
            await bench.step(random_inputs(2), 0)
        store.broken = False
        assert (await bench.engine.sessions.get(KEY)).position == 0
        np.testing.assert_array_equal((await bench.step(random_inputs(2), 0)).outputs, run_whole(random_inputs(2))[0])
