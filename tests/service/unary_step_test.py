"""A step that is a call of its own gives everything back, however it ends."""

import asyncio
import contextlib
import gc
import logging

import grpc
import numpy as np

from service.errors import BadModelOutput
from tests.service.refusals import refused
from tests.service.support import outputs_of, random_inputs, run_whole, running_gateway, step_request


async def test_one_that_is_cancelled_is_not_applied_and_holds_nothing(caplog):
    inputs = random_inputs(2)
    async with running_gateway() as running:
        await running.create("a")
        running.executor.hold()
        call = running.stub.Step(step_request("a", inputs, 0))
        await running.executor.entered.wait()
        call.cancel()
        async with asyncio.timeout(10):
            await running.gateway.engine._admission.idle()
        running.executor.gate.set()
        other = await running.stub.Step(step_request("a", 2 * inputs, 0))
        np.testing.assert_array_equal(outputs_of(other), run_whole(2 * inputs)[0])
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


async def test_its_time_limit_is_its_own():
    inputs = random_inputs(2)
    async with running_gateway() as running:
        await running.create("a")
        running.executor.hold()
        code, reason, _ = await refused(running.stub.Step(step_request("a", inputs, 0, timeout=0.02)))
        assert (code, reason) == (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED")
        running.executor.gate.set()
        again = await running.stub.Step(step_request("a", inputs, 0))
        np.testing.assert_array_equal(outputs_of(again), run_whole(inputs)[0])


async def test_one_that_fails_in_its_batch_leaves_no_frames_in_cycles():
    inputs = random_inputs(1)

    def fault(batch):
        raise BadModelOutput("the model failed")

    async def fail(running):
        with contextlib.suppress(grpc.RpcError):
            await running.stub.Step(step_request("a", inputs, 0))

    async with running_gateway() as running:
        await running.create("a")
        running.executor.fault = fault
        _, reason, _ = await refused(running.stub.Step(step_request("a", inputs, 0)))
        assert reason == "BAD_MODEL_OUTPUT"
        for _ in range(3):
            await fail(running)
        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(10):
                await fail(running)
            gc.collect()
            frames = [found.f_code.co_qualname for found in gc.garbage if type(found).__name__ == "frame"]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        running.executor.fault = None
        assert (await running.stub.Step(step_request("a", inputs, 0))).position == 1
    assert not [name for name in frames if "fail" not in name]
