import pytest

from service.errors import CommitUnknown, StoreUnavailable
from service.sessions import Committed, Verdict
from service.sessions.redis import RedisStore
from service.sessions.redis.durability import Durability
from tests.service.sessions.benches import PATIENCE, commit_on, info_of, key_of, same
from tests.service.sessions.valkey import Valkey, free_port

KEY = key_of()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("server", Durability()),
        ("aof", Durability(aof=True)),
        ("replicas=2", Durability(replicas=2)),
        ("aof,replicas=1", Durability(aof=True, replicas=1)),
    ],
)
def test_settings(text, expected):
    assert Durability.parse(text) == expected
    assert bool(expected) == (text != "server")


@pytest.mark.parametrize("text", ["", "always", "replicas=0", "aof,", ",replicas=1", "replicas=1,aof", "aofreplicas=1"])
def test_settings_that_mean_nothing(text):
    with pytest.raises(ValueError, match="expected 'server'"):
        Durability.parse(text)


@pytest.fixture
def make_server(tmp_path):
    servers = []

    def make(name, **options):
        servers.append(Valkey(tmp_path / name, port=free_port(), **options).start())
        return servers[-1]

    yield make
    for server in reversed(servers):
        server.stop()


@pytest.fixture
async def make_store():
    stores = []

    def make(server, durability, **options):
        stores.append(
            RedisStore(
                server.url,
                max_sessions=9,
                durability=durability,
                **{**PATIENCE, **options},
            )
        )
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


async def test_waiting_for_the_disk(make_server, make_store):
    """What was answered is on the disk, though the server itself syncs once a second: a kill -9 loses none of it."""
    server = make_server("a", appendonly="yes", appendfsync="everysec")
    store = make_store(server, "aof")
    session = (await store.commit(KEY, commit_on(await store.create(info_of())))).session
    server.kill()
    server.start()
    assert same(await store.load(KEY, fresh=True), session)


async def test_a_server_without_a_log_cannot_promise_the_disk(make_server, make_store, caplog):
    server = make_server("a")
    with pytest.raises(StoreUnavailable):
        await make_store(server, "aof").create(info_of())
    assert "appendonly is disabled" in caplog.text
    assert server.client.dbsize() == 0


async def test_a_commit_that_too_few_replicas_have_is_unknown(make_server, make_store):
    primary = make_server("a", **{"repl-diskless-sync-delay": "0"})
    plain, careful = make_store(primary, "server"), make_store(primary, "replicas=1")
    careful._writes._barrier = careful._writes._barrier._replace(timeout=0.2)  # of the wait alone
    session = await plain.create(info_of())
    commit = commit_on(session)
    await careful.load(KEY)
    with pytest.raises(CommitUnknown, match="not as durable as asked"):
        await careful.commit(KEY, commit)
    # It is written here, and a replayed reply must not be given away before it has got as far as a new one.
    assert (await plain.load(KEY, fresh=True)).position == 1
    with pytest.raises(CommitUnknown):
        await careful.commit(KEY, commit)
    with pytest.raises(StoreUnavailable):
        await careful.load(KEY, fresh=True)
    replica = make_server("b", replicaof=f"127.0.0.1 {primary.port}")
    while not replica.client.get("ntm:barrier"):  # it has taken over the primary's data
        replica.client.ping()
    replayed = await make_store(primary, "replicas=1").commit(KEY, commit)
    assert replayed.verdict is Verdict.REPLAY
    await make_store(primary, "replicas=1").load(KEY, fresh=True)


async def test_a_replica_that_takes_over_has_every_acknowledged_step(make_server, make_store):
    primary = make_server("a", appendonly="yes", appendfsync="always", **{"repl-diskless-sync-delay": "0"})
    replica = make_server("b", appendonly="yes", appendfsync="always", replicaof=f"127.0.0.1 {primary.port}")
    store = make_store(primary, "aof,replicas=1")
    while replica.client.info("replication")["master_link_status"] != "up":
        replica.client.ping()
    session = await store.create(info_of())
    for number in range(3):
        session = (await store.commit(KEY, commit_on(session, seed=number))).session
        primary_says = session
    primary.kill()
    replica.client.replicaof("NO", "ONE")
    heir = make_store(replica, "server")
    assert same(await heir.load(KEY), primary_says)
    assert isinstance(await heir.commit(KEY, commit_on(session)), Committed)
