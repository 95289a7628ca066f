"""The ways to the store that need more than a port: TLS, and Sentinels that say which server is the primary."""

import asyncio
import ssl
import subprocess

import pytest

from service.errors import CommitUnknown, StoreUnavailable
from service.sessions import Committed, Refused
from service.sessions.redis import RedisStore
from tests.service.sessions.benches import PATIENCE, commit_on, info_of, key_of, same
from tests.service.sessions.valkey import Valkey, documented_users, free_port

KEY = key_of()


@pytest.fixture
async def make_store():
    stores = []

    def make(url, **options):
        stores.append(RedisStore(url, max_sessions=9, **{**PATIENCE, **options}))
        return stores[-1]

    yield make
    for store in stores:
        await store.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost"
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*command.split(), *names], check=True, capture_output=True)
    return cert, key


@pytest.fixture
async def tls_port(valkey, certificate):
    """The tests' server behind TLS (its binary is built without): a proxy ends the encryption."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)

    async def serve(reader, writer):
        to_reader, to_writer = await asyncio.open_unix_connection(str(valkey.socket))
        await asyncio.gather(_pump(reader, to_writer), _pump(to_reader, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    yield server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()


async def _pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def test_tls_with_a_certificate_that_is_trusted(make_store, tls_port, certificate, prefix):
    store = make_store(f"rediss://localhost:{tls_port}/0?ssl_ca_certs={certificate[0]}", prefix=prefix)
    session = await store.create(info_of())
    assert isinstance(await store.commit(KEY, commit_on(session)), Committed)
    await store.close()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
async def test_tls_with_a_certificate_that_is_not_trusted(make_store, tls_port, prefix, host, caplog):
    with pytest.raises(StoreUnavailable):
        await make_store(f"rediss://{host}:{tls_port}/0", prefix=prefix).create(info_of())
    assert "certificate" in caplog.text


@pytest.mark.slow
async def test_sentinels_say_which_server_is_the_primary(tmp_path, make_store):
    """The primary is killed: the Sentinel makes the replica primary, and the gateway finds it by itself.

    At the Sentinel the gateway is the user that the documentation describes."""
    primary = Valkey(tmp_path / "primary", port=free_port(), **{"repl-diskless-sync-delay": "0"}).start()
    replica = Valkey(tmp_path / "replica", port=free_port(), replicaof=f"127.0.0.1 {primary.port}").start()
    sentinel = start_sentinel(tmp_path / "sentinel", primary.port).grant(documented_users()[1])
    login = "sentinel_username=gateway&sentinel_password=secret"
    try:
        store = make_store(
            f"redis+sentinel://127.0.0.1:1,127.0.0.1:{sentinel.port}/sessions/0?{login}", durability="replicas=1"
        )
        async with asyncio.timeout(150):
            session = await _until_it_works(lambda: store.create(info_of()))
            outcome = await _until_it_works(lambda: store.commit(KEY, commit_on(session)))
            await asyncio.to_thread(_await_known_replica, sentinel)
            primary.kill()
            heir = make_store(f"redis+sentinel://127.0.0.1:{sentinel.port}/sessions/0?{login}")
            commit = commit_on(outcome.session, inputs="after")
            found = await _until_it_works(lambda: heir.commit(KEY, commit))
        # An attempt that got no answer may have been the one that was applied.
        assert isinstance(found, Committed | Refused)
        assert found.session.position == 2
        replica_store = make_store(replica.url)
        assert same(await replica_store.load(KEY), found.session)
    finally:
        for server in (sentinel, replica, primary):
            server.stop()


async def test_sentinels_that_are_down_make_the_store_unavailable(make_store, caplog):
    with pytest.raises(StoreUnavailable):
        await make_store(f"redis+sentinel://127.0.0.1:{free_port()}/sessions").create(info_of())
    assert "sessions" in caplog.text


def start_sentinel(folder, primary_port):
    folder.mkdir()
    settings = folder / "sentinel.conf"
    port = free_port()
    lines = [
        f"port {port}",
        "bind 127.0.0.1",
        f"unixsocket {folder / 's'}",
        f"dir {folder}",
        f"sentinel monitor sessions 127.0.0.1 {primary_port} 1",
        "sentinel down-after-milliseconds sessions 500",
        "sentinel failover-timeout sessions 3000",
    ]
    settings.write_text("\n".join(lines) + "\n")
    sentinel = Valkey(folder, port=port)
    sentinel.command = [str(settings), "--sentinel"]
    return sentinel.start()


def _await_known_replica(sentinel):
    while not any(
        row["flags"] == "slave"
        for row in sentinel.client.sentinel_slaves("sessions")
        if row["master-link-status"] == "ok"
    ):
        sentinel.client.ping()


async def _until_it_works(operation):
    while True:
        try:
            return await operation()
        except (StoreUnavailable, CommitUnknown):
            await asyncio.sleep(0.05)
