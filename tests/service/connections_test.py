"""A gateway takes only so many connections."""

import asyncio

import numpy as np

from service.client import AsyncSequenceClient, RetryPolicy
from tests.service.support import outputs_of, random_inputs, run_whole, running_gateway, step_request


async def connect(running):
    """A connection, and the first bytes that come on it: HTTP/2's settings, or none where it was not taken."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    try:
        return writer, await reader.read(9)
    except ConnectionResetError:
        return writer, b""


async def close(writer):
    writer.close()
    await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def test_one_connection_too_many_is_closed_and_whoever_is_there_goes_on():
    async with running_gateway(max_connections=3) as running:
        await running.create("s")
        inputs = random_inputs(4)
        first = await running.stub.Step(step_request("s", inputs[:2], 0))
        there = [await connect(running) for _ in range(2)]
        assert all(settings for _, settings in there)
        beyond, nothing = await connect(running)
        assert nothing == b""
        second = await running.stub.Step(step_request("s", inputs[2:], 2))
        outputs = np.concatenate([outputs_of(first), outputs_of(second)])
        np.testing.assert_array_equal(outputs, run_whole(inputs)[0])
        for writer in (beyond, *[writer for writer, _ in there]):
            await close(writer)


async def test_a_client_that_finds_no_room_gets_in_when_there_is_some():
    async with running_gateway(max_connections=2) as running:
        await running.create("s")
        taken, settings = await connect(running)
        assert settings
        async with AsyncSequenceClient(running.target, retry=RetryPolicy(initial=0.01, maximum=0.1)) as client:
            session = await client.attach("s", position=0)
            step = asyncio.ensure_future(session.step(random_inputs(1), timeout=60))
            beyond, nothing = await connect(running)
            assert nothing == b""
            assert not step.done()
            await close(beyond)
            await close(taken)
            np.testing.assert_array_equal(await step, run_whole(random_inputs(1))[0])
