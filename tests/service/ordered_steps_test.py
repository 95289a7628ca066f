"""``BatchStep``: many steps in one call, without tasks as far as that goes, answered in their order."""

import asyncio
import contextvars
import itertools

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntm_serving.v1 import sequence_service_pb2 as pb
from service.errors import DeadlineExceeded
from service.identity import ANONYMOUS, set_caller
from service.limits import Limits
from service.logs import RequestLog
from service.observing import SILENT
from service.ordered_steps import OrderedSteps
from service.servicer import SequenceServicer
from service.stepping import Stepping
from service.types import SessionKey
from tests.service.batching import settle
from tests.service.benches import Bench
from tests.service.refusals import reason_of
from tests.service.support import (
    NumpyExecutor,
    compute,
    outputs_of,
    random_inputs,
    run_whole,
    running_gateway,
    step_request,
)

CALLER = contextvars.ContextVar("CALLER", default="nobody")


class Handle:
    """Steps that were begun without tasks."""

    def __init__(self, requests):
        self.open = list(requests)
        self.cancelled = False

    def __len__(self):
        return len(self.open)

    def cancel(self, name=None):
        self.cancelled = True


class World:
    """Begins steps, and ends them one by one as it is told. ``fates``: "short" without a task, "task" with one, "again"
    without one and then with one after all."""

    def __init__(self, fates):
        self.fates = dict(enumerate(fates))
        self.handles = []
        self.waiting = {}  # requests in tasks, and the futures that they wait for
        self.begun = []  # numbers
        self.most = 0

    def fate(self, request):
        return self.fates[int(request.request_id)]

    def under_way(self):
        return [request for handle in self.handles for request in handle.open] + [one for one, _ in self.in_tasks()]

    def in_tasks(self):
        return list(self.waiting.values())

    def begin(self, requests, told):
        self.told = told
        sessions = [request.session_id for request in requests]
        assert len(set(sessions)) == len(sessions)
        assert not set(sessions) & {request.session_id for request in self.under_way()}
        short = [request for request in requests if self.fate(request) != "task"]
        self.begun += [int(request.request_id) for request in short]
        handles = [Handle(part) for part in (short[::2], short[1::2])]
        self.handles += handles
        self.most = max(self.most, len(self.under_way()))
        return handles, [request for request in requests if self.fate(request) == "task"]

    async def answer(self, request):
        assert CALLER.get() == "caller"
        number = int(request.request_id)
        if self.fate(request) != "again" or number not in self.begun:
            self.begun.append(number)
        future = asyncio.get_running_loop().create_future()
        self.waiting[number] = request, future
        self.most = max(self.most, len(self.under_way()))
        try:
            await future
        finally:
            del self.waiting[number]
        return self.response(request)

    def response(self, request):
        return pb.StepResponse(request_id=request.request_id, position=int(request.request_id))

    def end(self, place):
        """One of those under way, whichever this is."""
        running = [(handle, request) for handle in self.handles for request in handle.open]
        running += [(None, one) for one in self.in_tasks()]
        handle, one = running[place % len(running)]
        if handle is None:
            _, future = one
            if not future.done():
                future.set_result(None)
            return
        handle.open.remove(one)
        again = self.fate(one) == "again"
        self.told(handle, [] if again else [(one, self.response(one))], [one] if again else [])


def requests_of(sessions):
    return [pb.StepRequest(session_id=session, request_id=str(number)) for number, session in enumerate(sessions)]


@settings(deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from("abcde"), st.sampled_from(["short", "task", "again"])), max_size=30),
    ends=st.lists(st.integers(0, 50), min_size=1),
    most=st.integers(1, 12),
)
def test_whatever_ends_first_steps_of_a_session_begin_in_order_and_responses_stand_in_order(steps, ends, most):
    async def run():
        CALLER.set("caller")
        world = World([fate for _, fate in steps])
        requests = requests_of([session for session, _ in steps])
        calls = OrderedSteps(requests, begin=world.begin, answer=world.answer, most=most)
        running = asyncio.create_task(calls.run())
        for place in itertools.cycle(ends):
            await settle()
            if running.done():
                break
            contextvars.Context().run(world.end, place)  # as the batcher tells of it: as nobody
        assert not calls._handles
        assert [response.request_id for response in running.result()] == [str(at) for at in range(len(steps))]
        assert sorted(world.begun) == list(range(len(steps)))
        assert world.most <= most
        for session in "abcde":
            mine = [number for number in world.begun if steps[number][0] == session]
            assert mine == sorted(mine)

    asyncio.run(run())


async def test_a_call_that_is_cancelled_leaves_nothing_under_way():
    CALLER.set("caller")
    world = World(["short", "short", "task", "task"])
    calls = OrderedSteps(requests_of("abcd"), begin=world.begin, answer=world.answer)
    running = asyncio.create_task(calls.run())
    await settle()
    assert len(world.waiting) == 2
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await settle()
    assert not world.waiting
    assert all(handle.cancelled for handle in world.handles)


async def test_steps_that_have_nothing_to_wait_for_need_no_tasks(monkeypatch):
    async with running_gateway() as running:
        monkeypatch.setattr(running.gateway.engine, "step", None)
        for number in range(100):
            await running.create(f"s{number}")
        inputs = random_inputs(3)
        for at in range(3):
            requests = [step_request(f"s{number}", inputs[at : at + 1], at, str(number)) for number in range(100)]
            reply = await running.stub.BatchStep(pb.BatchStepRequest(requests=requests))
            assert [r.request_id for r in reply.responses] == [str(number) for number in range(100)]
            for response in reply.responses:
                np.testing.assert_array_equal(outputs_of(response), run_whole(inputs)[0][at : at + 1])


async def test_more_steps_than_are_under_way_at_once_are_all_answered():
    async with running_gateway(max_queued_steps=600, max_sessions=2000) as running:
        for number in range(700):
            await running.create(f"s{number}")
        requests = [step_request(f"s{number}", random_inputs(1, number), 0, str(number)) for number in range(700)]
        reply = await running.stub.BatchStep(pb.BatchStepRequest(requests=requests))
        for number, response in enumerate(reply.responses):
            np.testing.assert_array_equal(outputs_of(response), run_whole(random_inputs(1, number))[0])


async def test_each_step_fails_for_itself():
    def bad(batch):
        result = compute(batch)
        result.state[batch.inputs[:, 0, 0] == 7.0] = np.nan
        return result

    executor = NumpyExecutor()
    executor.fault = bad
    async with running_gateway(executor) as running:
        for name in "abc":
            await running.create(name)
        broken = random_inputs(1)
        broken[0, 0] = 7.0
        wide = np.zeros((1, 9), np.float32)
        requests = [
            step_request(name, inputs, 0, name)
            for name, inputs in (("a", random_inputs(1)), ("b", broken), ("c", wide), ("d", random_inputs(1)))
        ]
        responses = (await running.stub.BatchStep(pb.BatchStepRequest(requests=requests))).responses
        assert not responses[0].HasField("status")
        reasons = [reason_of(response.status) for response in responses[1:]]
        assert reasons == ["BAD_MODEL_OUTPUT", "INVALID_TENSOR", "SESSION_NOT_FOUND"]
        assert [response.request_id for response in responses] == list("abcd")
        assert len(executor.batches) == 1  # what a step came to is known without running it again


@pytest.mark.parametrize(("own", "of_call"), [(0.02, None), (0.02, 60.0), (None, 0.02), (60.0, 0.02)])
async def test_a_step_has_its_own_time_limit_or_that_of_its_call_whichever_ends_first(own, of_call):
    set_caller(lambda: ANONYMOUS, "somebody")
    executor = NumpyExecutor()
    async with Bench(executor) as bench:
        keys = [SessionKey(ANONYMOUS.name, name) for name in "abc"]
        for key in keys:
            await bench.create(key)
        limits = Limits(
            max_chunk_bytes=1 << 20, max_stream_steps=9, step_timeout=60.0, session_ttl=60.0, max_session_ttl=60.0
        )
        stepping = Stepping(bench.engine, limits, SILENT, RequestLog(0.0))
        requests = [step_request(key.session_id, random_inputs(1), 0, timeout=own) for key in keys]
        executor.hold()
        with pytest.raises(DeadlineExceeded):
            await stepping.step(requests[0], of_call)
        assert reason_of((await stepping.answer(requests[1], of_call)).status) == "DEADLINE_EXCEEDED"
        told = asyncio.get_running_loop().create_future()
        begun, left = stepping.begin_in_order(
            requests[2:], lambda handle, answers, again: told.set_result(answers), of_call
        )
        assert (len(begun), len(left)) == (1, 0)
        ((_, response),) = await asyncio.wait_for(told, 10)
        assert reason_of(response.status) == "DEADLINE_EXCEEDED"
        executor.gate.set()


async def test_the_time_limit_of_a_step_is_its_own_and_that_of_the_call(monkeypatch):
    expired = asyncio.Event()
    async with running_gateway() as running:
        monkeypatch.setattr(running.gateway.monitor.observer, "failed", lambda error: expired.set())
        engine = running.gateway.engine
        for name in "ab":
            await running.create(name)
        running.executor.hold()
        requests = [step_request("a", random_inputs(1), 0, timeout=0.05), step_request("b", random_inputs(1), 0)]
        reply = asyncio.ensure_future(running.stub.BatchStep(pb.BatchStepRequest(requests=requests)))
        await running.executor.entered.wait()
        await asyncio.wait_for(expired.wait(), 10)
        running.executor.gate.set()
        late, in_time = (await reply).responses
        assert reason_of(late.status) == "DEADLINE_EXCEEDED"
        assert in_time.position == 1
        running.executor.hold()
        # Only the client keeps the call's limit here: the gateway's answer that it is over could be there before.
        monkeypatch.setattr(Stepping, "_limit", lambda self, limit, remaining: 60.0)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await running.stub.BatchStep(
                pb.BatchStepRequest(requests=[step_request("b", random_inputs(1), 1)]), timeout=0.05
            )
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await asyncio.wait_for(engine._admission.idle(), 10)
        running.executor.gate.set()
        session = await running.stub.GetSession(pb.GetSessionRequest(session_id="b"))
        assert session.position == 1


async def test_further_steps_begin_once_half_of_those_under_way_are_through():
    CALLER.set("caller")
    world = World(["short"] * 8)
    running = asyncio.create_task(
        OrderedSteps(requests_of("abcdefgh"), begin=world.begin, answer=world.answer, most=4).run()
    )
    counts = []
    while not running.done():
        await settle()
        counts.append(len(world.under_way()))
        if counts[-1]:
            world.end(0)
    assert counts == [4, 3, 4, 3, 4, 3, 2, 1, 0]


class LessAndLess:
    """A call's context: each time it is asked, a second less is left."""

    left = 10.0

    def time_remaining(self):
        self.left -= 1.0
        return self.left


async def test_a_step_that_begins_later_has_less_left_of_its_call():
    limits = []

    class Recorded:
        def begin_in_order(self, requests, told, remaining):
            limits.append(remaining)
            return (), requests

        async def answer(self, request, remaining):
            limits.append(remaining)
            return pb.StepResponse(request_id=request.request_id)

    async with Bench() as bench:
        servicer = SequenceServicer(bench.engine, Recorded(), None, None)
        reply = await servicer.BatchStep(pb.BatchStepRequest(requests=requests_of("aab")), LessAndLess())
    assert [response.request_id for response in reply.responses] == ["0", "1", "2"]
    assert limits == [9.0, 8.0, 7.0, 6.0]
