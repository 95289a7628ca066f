"""``Step``: a step that comes as a call of its own takes the short way where there is one."""

import asyncio
import gc
import weakref

import grpc
import numpy as np
import pytest

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import BadModelOutput, DeadlineExceeded
from service.identity import ANONYMOUS, set_caller
from service.limits import Limits
from service.logs import RequestLog
from service.observing import SILENT
from service.stepping import Stepping
from service.types import StepReply
from tests.service.batching import settle
from tests.service.benches import KEY, Bench
from tests.service.support import compute, outputs_of, random_inputs, run_whole, running_gateway, step_request


@pytest.fixture
async def bench():
    async with Bench() as bench:
        await bench.create()
        yield bench


def held(engine):
    deadlines = [step for tick in engine.singles._deadlines._ticks.values() for step in tick]
    return engine._admission.steps, engine._admission.nbytes, len(engine._turns.held), len(deadlines)


async def test_calls_of_their_own_need_not_go_the_long_way(monkeypatch):
    async with running_gateway() as running:
        monkeypatch.setattr(running.gateway.engine, "step", None)
        await running.create("s")
        inputs, outputs = random_inputs(9), []
        for begin, end in ((0, 2), (2, 3), (3, 9)):
            response = await running.stub.Step(step_request("s", inputs[begin:end], begin, "r"))
            assert (response.request_id, response.session_id, response.position) == ("r", "s", end)
            outputs.append(outputs_of(response))
        np.testing.assert_array_equal(np.concatenate(outputs), run_whole(inputs)[0])


async def test_what_is_out_of_the_ordinary_goes_the_long_way():
    async with running_gateway() as running:
        await running.create("s")
        first, again = [await running.stub.Step(step_request("s", random_inputs(2), 0)) for _ in range(2)]
        assert first == again  # the second is the stored reply
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await running.stub.Step(step_request("s", random_inputs(2), 7))
        assert refused.value.code() is grpc.StatusCode.ABORTED


async def test_a_call_that_is_cancelled_gives_up_its_step(caplog):
    async with running_gateway() as running:
        await running.create("s")
        running.executor.hold()
        call = running.stub.Step(step_request("s", random_inputs(2), 0))
        await running.executor.entered.wait()
        assert held(running.gateway.engine)[::2] == (1, 1)
        call.cancel()
        await asyncio.wait_for(running.gateway.engine._admission.idle(), 10)
        assert held(running.gateway.engine) == (0, 0, 0, 0)
        running.executor.gate.set()
        session = await running.stub.GetSession(pb.GetSessionRequest(session_id="s"))
        assert session.position == 0
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_step_ends_by_the_deadline_of_its_call():
    async with running_gateway() as running:
        await running.create("s")
        running.executor.hold()
        with pytest.raises(grpc.aio.AioRpcError) as late:
            await running.stub.Step(step_request("s", random_inputs(2), 0), timeout=0.05)
        assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(running.gateway.engine._admission.idle(), 10)
        assert held(running.gateway.engine) == (0, 0, 0, 0)
        running.executor.gate.set()


async def test_a_step_ends_by_its_own_time_limit_where_that_comes_first(bench):
    bench.executor.hold()
    with pytest.raises(DeadlineExceeded):
        await bench.engine.singles.step(bench.call(random_inputs(2), 0, limit=0.02), None)
    assert held(bench.engine) == (0, 0, 0, 0)
    bench.executor.gate.set()


async def test_what_the_session_turns_out_not_to_be_is_left_to_the_long_way(bench):
    there = bench.store._sessions[KEY]

    def meanwhile(batch):
        bench.store._sessions[KEY] = there._replace(token=bytes(len(there.token)))
        return compute(batch)

    bench.executor.fault = meanwhile
    assert await bench.engine.singles.step(bench.call(random_inputs(2), 0), None) is None
    assert held(bench.engine) == (0, 0, 0, 0)


async def test_a_failure_is_raised_and_leaves_nothing_to_the_collector(bench):
    def bad(batch):
        result = compute(batch)
        return result._replace(state=result.state * np.nan)

    bench.executor.fault = bad
    inputs = random_inputs(2)
    call = bench.call(inputs, 0)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(BadModelOutput) as failed:
            await bench.engine.singles.step(call, None)
        assert failed.value.version is not None
        kept = weakref.ref(inputs)
        del failed, call, inputs
        bench.executor.batches.clear()
        await settle()
        assert kept() is None
    finally:
        gc.enable()
    assert held(bench.engine) == (0, 0, 0, 0)


async def test_a_step_is_answered_only_once_its_commit_is_through(bench, monkeypatch):
    commits, commit_one_soon = [], bench.store.commit_one_soon
    monkeypatch.setattr(bench.store, "commit_one_soon", lambda *commit: commits.append(commit))
    step = asyncio.create_task(bench.engine.singles.step(bench.call(random_inputs(2), 0), None))
    await settle()
    ((session, commit, tell),) = commits
    assert not step.done()
    commit_one_soon(session, commit, tell)
    assert (await step).position == 2


async def test_the_long_way_has_what_is_left_of_the_same_time_limit(bench, monkeypatch):
    calls = []

    async def neither(call, owner_limit):
        calls.append(call)

    async def long_way(call, owner_limit):
        calls.append(call)
        return StepReply(1, random_inputs(1))

    set_caller(lambda: ANONYMOUS, "somebody")
    monkeypatch.setattr(bench.engine.singles, "step", neither)
    monkeypatch.setattr(bench.engine, "step", long_way)
    limits = Limits(max_chunk_bytes=1 << 20, max_stream_steps=9, step_timeout=9.0, session_ttl=9.0, max_session_ttl=9.0)
    stepping = Stepping(bench.engine, limits, SILENT, RequestLog(0.0))
    response = await stepping.step(step_request("a", random_inputs(1), 0, timeout=5.0), None)
    assert response.position == 1
    short, long = calls
    assert short is long
