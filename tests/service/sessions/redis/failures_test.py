"""What the store's server and the way to it can do wrong. Every server here is a real one of the test's own."""

import asyncio
import contextlib

import pytest
import redis

from service.errors import CommitUnknown, SessionNotFound, StoreUnavailable
from service.sessions import Committed, Refused, Verdict
from service.sessions.redis import RedisStore
from tests.service.sessions.benches import PATIENCE, commit_on, impatient, info_of, key_of, same
from tests.service.sessions.proxy import Proxy
from tests.service.sessions.valkey import Valkey, free_port

KEY = key_of()


@pytest.fixture
def make_server(tmp_path):
    servers = []

    def make(name="server", *, start=True, **options):
        servers.append(Valkey(tmp_path / name, **options))
        return servers[-1].start() if start else servers[-1]

    yield make
    for server in servers:
        server.stop()


@pytest.fixture
async def make_store():
    stores = []

    def make(url, **options):
        stores.append(RedisStore(url, **{"max_sessions": 100, **PATIENCE, **options}))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


@pytest.fixture
async def proxied(make_server, make_store):
    """A server, a proxy before it, and a store that knows only the proxy, with a session and its scripts known."""
    server = make_server(port=free_port())
    proxy = await Proxy(server.port).start()
    store = make_store(proxy.url)
    session = await store.create(info_of())
    outcome = await store.commit(KEY, commit_on(session))
    yield proxy, store, outcome.session
    await proxy.close()


async def all_refused(store, session):
    for operation in (
        store.load(KEY, fresh=True),
        store.create(info_of(key_of("new"))),
        store.commit(KEY, commit_on(session)),
        store.extend(KEY, 1000),
        store.delete(key_of("other")),
        store.counts(),
        store.list_sessions("p", limit=1),
    ):
        with pytest.raises(StoreUnavailable):
            await operation


async def test_a_server_that_is_down_takes_nothing_and_is_found_again(make_server, make_store):
    server = make_server(appendonly="yes", appendfsync="always")
    store = make_store(server.url)
    session = await store.create(info_of())
    session = (await store.commit(KEY, commit_on(session))).session
    server.kill()
    await all_refused(store, session)
    server.start()
    assert same(await store.load(KEY, fresh=True), session)
    assert isinstance(await store.commit(KEY, commit_on(session)), Committed)


async def test_the_operator_is_told_where_the_server_was_looked_for_and_the_client_is_not(make_store, caplog):
    port = free_port()
    store = make_store(f"redis://127.0.0.1:{port}/0")
    for _ in range(3):
        with pytest.raises(StoreUnavailable) as caught:
            await store.load(KEY)
        assert str(port) not in caught.value.message
    told = [record for record in caplog.records if str(port) in record.getMessage()]
    assert len(told) == 1, "once, until it was reached again"
    await store.sweep()  # housekeeping goes on, however the store is


async def test_kill_9_with_appendfsync_always_loses_no_step_that_was_acknowledged(make_server, make_store):
    """Sessions are stepped without a pause while the server is killed again and again."""
    server = make_server(appendonly="yes", appendfsync="always")
    store = make_store(server.url)
    acknowledged, over, stepped = {}, asyncio.Event(), asyncio.Condition()

    async def use(key):
        session = await store.create(info_of(key))
        number = 0
        while not over.is_set():
            commit = commit_on(session, inputs=number, seed=number)
            try:
                outcome = await store.commit(key, commit)
            except StoreUnavailable:
                await asyncio.sleep(0.005)
                continue
            except CommitUnknown:
                await asyncio.sleep(0.005)
                # As a client's retry would: the same step again, on whatever the store has now.
                session = await fresh(key)
                assert session.position in (number, number + 1)
                if session.position == number:
                    continue
                assert session.last.digest == commit.digest
            else:
                assert isinstance(outcome, Committed)
                session = outcome.session
            number += 1
            acknowledged[key] = session
            async with stepped:
                stepped.notify_all()
        return number

    async def fresh(key):
        while True:
            try:
                return await store.load(key, fresh=True)
            except StoreUnavailable:
                await asyncio.sleep(0.005)

    def total():
        return sum(session.position for session in acknowledged.values())

    users = [asyncio.create_task(use(key_of(f"s{number}"))) for number in range(8)]
    for _ in range(3):
        enough = total() + 100
        async with stepped:
            await stepped.wait_for(lambda enough=enough: total() >= enough)
        server.kill()
        server.start()
    server.kill()
    over.set()
    server.start()
    counts = await asyncio.gather(*users)
    reader = make_store(server.url)
    for (key, session), count in zip(sorted(acknowledged.items()), counts, strict=True):
        assert session.position == count
        assert same(await reader.load(key), session)
    assert sum(counts) >= 300


async def test_a_commit_that_gets_no_answer_is_unknown_and_not_lost(proxied):
    """It reached the server, which applied it: only the reply is missing."""
    proxy, store, session = proxied
    proxy.replies.clear()
    commit = commit_on(session, inputs="second")
    with impatient(store, 0.2), pytest.raises(CommitUnknown, match=r"within 0\.2 s"):
        await store.commit(KEY, commit)
    direct = RedisStore(f"redis://127.0.0.1:{proxy.target}/0", max_sessions=100, **PATIENCE)
    while (await direct.load(KEY, fresh=True)).position != 2:
        pass  # the server has yet to get to it
    await direct.close()
    proxy.replies.set()
    outcome = await store.commit(KEY, commit)
    assert isinstance(outcome, Refused)
    assert outcome.verdict is Verdict.REPLAY


async def test_a_commit_whose_connection_breaks_is_unknown(proxied):
    proxy, store, session = proxied
    proxy.replies.clear()
    proxy.asked.clear()
    commit = commit_on(session, inputs="second")
    task = asyncio.create_task(store.commit(KEY, commit))
    await proxy.asked.wait()
    proxy.cut()
    with pytest.raises(CommitUnknown):
        await task
    proxy.replies.set()
    session = await store.load(KEY, fresh=True)
    outcome = await store.commit(KEY, commit)
    assert isinstance(outcome, Committed) or outcome.verdict is Verdict.REPLAY
    assert session.position in (1, 2)


async def test_a_commit_that_arrives_late_is_still_checked(proxied):
    """It was given up, and another one got ahead of it: when it arrives after all, it must not be applied."""
    proxy, store, session = proxied
    direct = RedisStore(f"redis://127.0.0.1:{proxy.target}/0", max_sessions=100, **PATIENCE)
    proxy.requests.clear()  # it waits in the network
    with impatient(store, 0.2), pytest.raises(CommitUnknown):
        await store.commit(KEY, commit_on(session, inputs="late", seed=1))
    after = (await direct.commit(KEY, commit_on(session, inputs="ahead", seed=2))).session
    proxy.asked.clear()
    proxy.requests.set()
    await proxy.asked.wait()
    # The late one has been passed on by the time that the store answers something that went the same way.
    assert same(await store.load(KEY, fresh=True), after)
    assert same(await direct.load(KEY, fresh=True), after)
    await direct.close()


async def test_a_network_that_is_cut_refuses_and_heals(proxied):
    proxy, store, session = proxied
    proxy.refuse = True
    proxy.cut()
    await all_refused(store, session)
    proxy.refuse = False
    assert isinstance(await store.commit(KEY, commit_on(session)), Committed)


async def test_a_server_that_is_stopped_is_unknown_then_unavailable_then_back(make_server, make_store):
    server = make_server()
    store = make_store(server.url)
    session = await store.create(info_of())
    session = (await store.commit(KEY, commit_on(session))).session
    server.freeze()
    commit = commit_on(session, inputs="second")
    with impatient(store, 0.2):
        with pytest.raises(CommitUnknown):
            await store.commit(KEY, commit)
        await all_refused(store, session)  # nothing more was sent: a new connection does not answer
    server.resume()
    # What was sent is carried out now; the same step again finds it, or is applied, never both.
    outcome = await store.commit(KEY, commit)
    assert isinstance(outcome, Committed) or outcome.verdict is Verdict.REPLAY
    assert (await store.load(KEY, fresh=True)).position == 2


async def test_a_full_server_refuses_and_keeps_what_it_has(make_server, make_store):
    server = make_server()
    store = make_store(server.url)
    session = await store.create(info_of())
    session = (await store.commit(KEY, commit_on(session))).session
    server.client.config_set("maxmemory", "1")
    with pytest.raises(StoreUnavailable, match="OOM"):
        await store.commit(KEY, commit_on(session))
    with pytest.raises(StoreUnavailable, match="OOM"):
        await store.create(info_of(key_of("b")))
    assert same(await make_store(server.url).load(KEY), session)
    assert await store.counts() == {session.info.version: 1}
    await store.delete(KEY)  # room can be made
    server.client.config_set("maxmemory", "0")
    with pytest.raises(SessionNotFound):
        await store.commit(KEY, commit_on(session))


async def test_a_server_that_became_a_replica_takes_no_writes(make_server, make_store):
    server = make_server()
    store = make_store(server.url)
    session = await store.create(info_of())
    server.client.replicaof("127.0.0.1", free_port())
    with pytest.raises(StoreUnavailable, match="READONLY"):
        await store.commit(KEY, commit_on(session))
    server.client.replicaof("NO", "ONE")
    assert isinstance(await store.commit(KEY, commit_on(session)), Committed)


async def test_a_server_that_may_not_write_its_disk_takes_no_writes(make_server, make_store):
    server = make_server(**{"min-replicas-to-write": "0"})
    store = make_store(server.url)
    session = await store.create(info_of())
    server.client.config_set("min-replicas-to-write", "1")
    with pytest.raises(StoreUnavailable, match="NOREPLICAS"):
        await store.commit(KEY, commit_on(session))
    server.client.config_set("min-replicas-to-write", "0")
    assert isinstance(await store.commit(KEY, commit_on(session)), Committed)


async def test_a_server_that_is_busy_refuses(make_server, make_store):
    server = make_server(**{"busy-reply-threshold": "10"})
    store = make_store(server.url)
    session = await store.create(info_of())
    await store.commit(KEY, commit_on(session))
    await store.load(KEY, fresh=True)  # it is connected
    loop = asyncio.get_running_loop()
    spin = loop.run_in_executor(None, _spin, server)
    refusal = None
    while refusal is None:  # until the script has run for longer than the server likes
        try:
            await store.load(KEY, fresh=True)
        except StoreUnavailable as error:
            refusal = error
    assert "BUSY" in refusal.message
    while not spin.done():
        with contextlib.suppress(redis.ResponseError):  # it may not have begun
            server.client.script_kill()
        await asyncio.wait({spin}, timeout=0.05)
    assert (await store.load(KEY, fresh=True)).position == 1


def _spin(server):
    """Runs a script that ends only when it is killed; on a busy machine another one may stand in its way first."""
    with type(server.client)(unix_socket_path=str(server.socket)) as client:
        while True:
            with pytest.raises(redis.ResponseError) as caught:
                client.eval("while true do end", 0)
            if "killed" in str(caught.value):
                return


async def test_passwords_and_users(make_server, make_store):
    server = make_server(port=free_port(), requirepass="s3/cr:et")
    server.client.acl_setuser("gateway", enabled=True, passwords=["+pass"], keys=["*"], commands=["+@all"])
    address = f"127.0.0.1:{server.port}"
    for login in ("", ":wrong@", "gateway:wrong@"):
        with pytest.raises(StoreUnavailable) as caught:
            await make_store(f"redis://{login}{address}/0").create(info_of())
        assert "wrong" not in caught.value.message
    session = await make_store(f"redis://:s3%2Fcr%3Aet@{address}/0").create(info_of())
    assert same(await make_store(f"redis://gateway:pass@{address}/0").load(KEY), session)


async def test_databases_are_apart(make_server, make_store):
    server = make_server(port=free_port())
    await make_store(f"redis://127.0.0.1:{server.port}/3").create(info_of())
    with pytest.raises(SessionNotFound):
        await make_store(f"redis://127.0.0.1:{server.port}/4").load(KEY)
    assert (await make_store(f"unix://{server.socket}?db=3").load(KEY)).position == 0
