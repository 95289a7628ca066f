"""The rights that a gateway needs on the server: those that the documentation lists, all of them and no others.

The tests' shared server gives gateways these rights only, so every other test of the store is one of the list too.
"""

import asyncio
import re

import pytest

from service.errors import CommitUnknown, SessionLimit, SessionNotFound, StoreUnavailable
from service.sessions.redis import RedisStore
from tests.service.sessions.benches import PATIENCE, commit_on, info_of, key_of
from tests.service.sessions.valkey import Valkey, documented_users, free_port

KEY = key_of()
# What the test itself asks of the server, and what every user may do before it is one.
_NOT_THE_GATEWAYS = {"info", "config|resetstat", "auth"}


@pytest.fixture
def server(tmp_path):
    server = Valkey(tmp_path / "server", port=free_port(), appendonly="yes").start()
    server.grant(documented_users()[0])
    yield server
    server.stop()


async def everything(url):
    """All that a gateway ever does to a store, under each durability."""
    for durability in ("server", "aof", "replicas=1"):
        store = RedisStore(url, max_sessions=2, durability=durability, **PATIENCE)
        if durability == "replicas=1":  # there is none, so nothing is ever as durable; it is asked for all the same
            store._writes._barrier = store._writes._barrier._replace(timeout=0.001)
            with pytest.raises(StoreUnavailable):
                await store.create(info_of())
        else:
            session = await store.create(info_of(ttl=60))
            await store.extend(KEY, 100)
            await store.commit(KEY, commit_on(session))
            await store.load(KEY, fresh=True)
            await store.create(info_of(key_of("short"), ttl=0.001))
            await _until_gone(store, key_of("short"))
            await store.create(info_of(key_of("b")))
            with pytest.raises(SessionLimit):
                await store.create(info_of(key_of("c")))
            await store.list_sessions("p", limit=5)
            assert sum((await store.counts()).values()) == 2
            for name in "ab":
                await store.delete(key_of(name))
        await store.close()


async def _until_gone(store, key):
    while True:
        try:
            await store.load(key, fresh=True)
        except SessionNotFound:
            return
        await asyncio.sleep(0)


async def test_the_documented_rights_are_enough_and_none_is_too_many(server):
    server.client.config_resetstat()
    await everything(server.url.replace("/0", "/1"))
    used = {name.removeprefix("cmdstat_") for name in server.client.info("commandstats")} - _NOT_THE_GATEWAYS
    granted = set(re.findall(r"\+(\S+)", documented_users()[0]))
    assert used == granted
    assert all(stats["rejected_calls"] == 0 for stats in server.client.info("commandstats").values())


@pytest.mark.parametrize("command", ["FLUSHALL", "KEYS *", "CONFIG GET dir", "GET ntm:barrier", "ZCARD other:expiry"])
def test_the_documented_user_may_do_nothing_else(server, command):
    with pytest.raises(Exception, match="permission"):
        _as_gateway(server, command)


def _as_gateway(server, command):
    with type(server.client)(port=server.port, username="gateway", password="secret") as client:
        client.execute_command(*command.split())


async def test_a_user_without_the_right_to_write_is_told_of_in_the_log(server, caplog):
    """Whether a script was broken off before or after its writes the gateway cannot know, and does not say."""
    store = RedisStore(server.url, max_sessions=2, **PATIENCE)
    session = await store.create(info_of())
    server.client.execute_command("ACL", "SETUSER", "gateway", "-hset")
    with pytest.raises(CommitUnknown):
        await store.commit(KEY, commit_on(session))
    assert "hset" in caplog.text
    server.client.execute_command("ACL", "SETUSER", "gateway", "+hset")
    assert (await store.commit(KEY, commit_on(session))).session.position == 1
    await store.close()
