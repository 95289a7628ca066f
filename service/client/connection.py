"""What the blocking client and its sessions share: a channel, the calls on it, the threads that send steps."""

import threading
import time
import weakref
from typing import TypeVar

import grpc

from service.client import calls, errors, retry, wire
from service.client.options import ClientOptions, Metadata
from service.client.threads import StepThreads

T = TypeVar("T")


class Connection:
    """A connection to a gateway. It closes itself when nobody holds it any more.

    Args:
        target: A gRPC target.
        options: How to reach it.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, target: str, options: ClientOptions) -> None:
        options.check(target)
        self._options = options
        self._tracing = options.tracing()
        self._channel = _open_channel(target, options)
        self._closed = threading.Event()
        self.threads = StepThreads(self._channel, options)
        self.close = weakref.finalize(self, _shut_down, self._channel, self.threads, self._closed)

    def deadline(self, timeout: float | None) -> float:
        """When something that may take ``timeout`` seconds (None: the client's default) ends.

        Raises:
            ValueError: it is not positive and finite.
        """
        return time.monotonic() + wire.check_timeout(timeout, self._options.timeout)

    def invoke(self, call: calls.Call[T], timeout: float | None) -> T:
        """Makes a call, again while the gateway cannot be reached, within its time limit.

        Raises:
            GatewayError: it failed.
            RuntimeError: this process was forked off from the one that made the client.
        """
        if self._tracing is None:
            return self._invoke(call, timeout, ())
        with self._tracing.call(call.path) as trace_context:
            return self._invoke(call, timeout, trace_context)

    def _invoke(self, call: calls.Call[T], timeout: float | None, trace_context: Metadata) -> T:
        self.threads.check_process()
        deadline = self.deadline(timeout)
        method = self._channel.unary_unary(call.path, type(call.request).SerializeToString, call.response.FromString)
        attempt = 0
        while not self._closed.is_set():
            attempt += 1
            try:
                left = max(deadline - time.monotonic(), 1e-3)
                response = method(call.request, timeout=left, metadata=(*self._options.metadata(), *trace_context))
            except grpc.RpcError as broken:
                error = errors.from_call(broken)
            except ValueError:  # gRPC's way to say that the channel was closed meanwhile
                break
            else:
                return call.read(response)
            delay = self._options.retry.delay(attempt, error)
            if not retry.repeats_call(error) or time.monotonic() + delay >= deadline:
                raise error
            self._closed.wait(delay)
        raise errors.closed("the client is closed")


def _open_channel(target: str, options: ClientOptions) -> grpc.Channel:
    if options.credentials is None:
        return grpc.insecure_channel(target, options.channel_options())
    return grpc.secure_channel(target, options.credentials, options.channel_options())


def _shut_down(channel: grpc.Channel, threads: StepThreads, closed: threading.Event) -> None:
    if threads.forked:  # it is the other process's to close
        return
    closed.set()
    threads.close("the client is closed")
    channel.close()
