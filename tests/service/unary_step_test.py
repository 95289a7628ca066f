"""A step that is a call of its own gives everything back, however it ends."""

import asyncio
import logging

import grpc
import numpy as np

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
