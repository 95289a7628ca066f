# A time limit goes to the gateway with the request: cutting a call off from outside would leave its work running.
# ruff: noqa: ASYNC109
"""What the asyncio client and its sessions share: a channel, the calls on it, the tasks that send steps."""

import asyncio
from typing import TypeVar

import grpc

from service.client import calls, errors, retry, wire
from service.client.options import ClientOptions, Metadata
from service.client.tasks import StepTasks

T = TypeVar("T")


class AsyncConnection:
    """A connection to a gateway, on the event loop that runs when it is made.

    Args:
        target: A gRPC target.
        options: How to reach it.

    Raises:
        ValueError: an option is out of range.
        RuntimeError: no event loop runs.
    """

    def __init__(self, target: str, options: ClientOptions) -> None:
        options.check(target)
        self._options = options
        self._tracing = options.tracing()
        self._loop = asyncio.get_running_loop()
        self._channel = _open_channel(target, options)
        self._closed = False
        self.tasks = StepTasks(self._channel, options)

    def deadline(self, timeout: float | None) -> float:
        """When something that may take ``timeout`` seconds (None: the client's default) ends.

        Raises:
            ValueError: it is not positive and finite.
        """
        return self._loop.time() + wire.check_timeout(timeout, self._options.timeout)

    async def invoke(self, call: calls.Call[T], timeout: float | None) -> T:
        """Makes a call, again while the gateway cannot be reached, within its time limit.

        Raises:
            GatewayError: it failed.
        """
        if self._tracing is None:
            return await self._invoke(call, timeout, ())
        with self._tracing.call(call.path) as trace_context:
            return await self._invoke(call, timeout, trace_context)

    async def _invoke(self, call: calls.Call[T], timeout: float | None, trace_context: Metadata) -> T:
        deadline = self.deadline(timeout)
        method = self._channel.unary_unary(call.path, type(call.request).SerializeToString, call.response.FromString)
        attempt = 0
        while not self._closed:
            attempt += 1
            try:
                left = max(deadline - self._loop.time(), 1e-3)
                response = await method(
                    call.request, timeout=left, metadata=(*self._options.metadata(), *trace_context)
                )
            except grpc.RpcError as broken:
                error = errors.from_call(broken)
            else:
                return call.read(response)
            delay = self._options.retry.delay(attempt, error)
            if not retry.repeats_call(error) or self._loop.time() + delay >= deadline:
                raise error
            await asyncio.sleep(delay)
        raise errors.closed("the client is closed")

    async def close(self) -> None:
        """Fails what is under way and disconnects. Safe to call twice."""
        self._closed = True
        await self.tasks.close("the client is closed")
        await self._channel.close()


def _open_channel(target: str, options: ClientOptions) -> grpc.aio.Channel:
    if options.credentials is None:
        return grpc.aio.insecure_channel(target, options.channel_options())
    return grpc.aio.secure_channel(target, options.credentials, options.channel_options())
