"""What is done to the stack: each fault strikes, lasts, and is made good again."""

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import redis

from tests.chaos.stack import Stack

Fault = Callable[[Stack, random.Random], contextlib.AbstractAsyncContextManager[None]]


class Strike(NamedTuple):
    """One fault of a schedule: how long after the one before it was made good, which, and how long it lasts."""

    wait: float
    kind: str
    seconds: float


def schedule(seed: int, count: int, quiet: float) -> list[Strike]:
    """``count`` faults, every kind in turn in an order of the seed's, with ``quiet`` seconds between on average."""
    choose = random.Random(seed)
    kinds: list[str] = []
    while len(kinds) < count:
        kinds += choose.sample(sorted(FAULTS), len(FAULTS))
    return [Strike(choose.uniform(0.5, 1.5) * quiet, kind, choose.uniform(0.2, 1.0)) for kind in kinds[:count]]


@contextlib.asynccontextmanager
async def gateway_killed(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """``kill -9``; the clients have only the other."""
    gateway = choose.choice(stack.gateways)
    gateway.kill()
    yield
    gateway.start()
    await gateway.wait_serving()


@contextlib.asynccontextmanager
async def gateway_drained(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """SIGTERM, as in a rolling update."""
    gateway = choose.choice(stack.gateways)
    gateway.send(signal.SIGTERM)
    await gateway.wait_ended()
    yield
    gateway.start()
    await gateway.wait_serving()


@contextlib.asynccontextmanager
async def gateway_stopped(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """SIGSTOP: what it was about to do, it does later, when its clients have long gone on elsewhere."""
    gateway = choose.choice(stack.gateways)
    gateway.send(signal.SIGSTOP)
    yield
    await asyncio.sleep(1.0)
    gateway.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def model_server_killed(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    """``kill -9``; somebody restarts it after five seconds, and it has TensorFlow to load."""
    stack.model_server.kill()
    yield
    await asyncio.sleep(4.5)
    stack.model_server.start()
    await stack.model_server.wait_serving()


@contextlib.asynccontextmanager
async def model_server_stopped(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    stack.model_server.send(signal.SIGSTOP)
    yield
    stack.model_server.send(signal.SIGCONT)


@contextlib.asynccontextmanager
async def valkey_killed(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    """``kill -9``; it starts again from its log, which it writes before it answers (appendfsync always)."""
    stack.valkey.kill()
    yield
    await asyncio.to_thread(stack.valkey.start)


@contextlib.asynccontextmanager
async def valkey_stopped(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    """SIGSTOP for longer than gateways wait: what they gave up is carried out afterwards."""
    stack.valkey.freeze()
    yield
    await asyncio.sleep(1.0)
    stack.valkey.resume()


@contextlib.asynccontextmanager
async def valkey_paused(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    """Slow: it answers reads, and no writes for a while."""
    await asyncio.to_thread(stack.valkey.client.client_pause, 700, all=False)
    yield
    await asyncio.to_thread(stack.valkey.client.client_unpause)


@contextlib.asynccontextmanager
async def valkey_full(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    await asyncio.to_thread(stack.valkey.client.config_set, "maxmemory", "1")
    yield
    await asyncio.to_thread(stack.valkey.client.config_set, "maxmemory", "0")


@contextlib.asynccontextmanager
async def valkey_read_only(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    """A replica of nothing, as after a failover that the gateways have not heard of."""
    await asyncio.to_thread(stack.valkey.client.replicaof, "127.0.0.1", 1)
    yield
    await asyncio.to_thread(stack.valkey.client.replicaof, "NO", "ONE")


@contextlib.asynccontextmanager
async def valkey_scripts_forgotten(stack: Stack, _: random.Random) -> AsyncIterator[None]:
    with contextlib.suppress(redis.RedisError):
        await asyncio.to_thread(stack.valkey.client.script_flush)
    yield


@contextlib.asynccontextmanager
async def store_connections_cut(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    choose.choice(stack.to_store).cut()
    yield


@contextlib.asynccontextmanager
async def store_unreachable(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """One gateway has no way to the store; the other has."""
    proxy = choose.choice(stack.to_store)
    proxy.refuse = True
    proxy.cut()
    yield
    proxy.refuse = False


@contextlib.asynccontextmanager
async def store_answers_lost(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """Commits arrive and are applied; nobody hears of it."""
    proxy = choose.choice(stack.to_store)
    proxy.replies.clear()
    yield
    proxy.cut()
    proxy.replies.set()


@contextlib.asynccontextmanager
async def store_requests_late(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """Commits wait in the network for longer than the gateway waits for them, and arrive after all."""
    proxy = choose.choice(stack.to_store)
    proxy.requests.clear()
    yield
    await asyncio.sleep(1.0)
    proxy.requests.set()


@contextlib.asynccontextmanager
async def client_connections_cut(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    choose.choice(stack.to_gateway).cut()
    yield


@contextlib.asynccontextmanager
async def client_answers_lost(stack: Stack, choose: random.Random) -> AsyncIterator[None]:
    """Steps are applied; their clients never hear of it."""
    proxy = choose.choice(stack.to_gateway)
    proxy.replies.clear()
    yield
    proxy.cut()
    proxy.replies.set()


FAULTS: dict[str, Fault] = {
    fault.__name__.replace("_", " "): fault
    for fault in (
        gateway_killed,
        gateway_drained,
        gateway_stopped,
        model_server_killed,
        model_server_stopped,
        valkey_killed,
        valkey_stopped,
        valkey_paused,
        valkey_full,
        valkey_read_only,
        valkey_scripts_forgotten,
        store_connections_cut,
        store_unreachable,
        store_answers_lost,
        store_requests_late,
        client_connections_cut,
        client_answers_lost,
    )
}
