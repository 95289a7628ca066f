"""The TensorFlow Serving executor against real model server processes."""

import asyncio
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import grpc
import pytest
import trustme

from service.backends import make_executor
from service.config import Settings
from service.errors import ExecutorUnavailable, ModelVersionUnavailable
from service.executors.tf_serving import TfServingExecutor
from service.types import VersionKey
from tests.service.executors.fake_model_server import FakeModelServer, running
from tests.service.executors.sequence_models import assert_close, expected, export_sums, random_batch
from tests.service.executors.tf_serving import ONE, TWO, executor_of, until
from tests.service.model_server.processes import ModelServer, running_model_server, start_model_server


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    export_sums(directory)
    export_sums(directory, version=2, scale=2.0)
    export_sums(directory, "wide", width=5)
    return directory


class Server(NamedTuple):
    """A model server, and how to connect to it."""

    process: ModelServer
    credentials: grpc.ChannelCredentials | None
    settings: Mapping[str, Path]

    @property
    def address(self) -> str:
        return self.process.address


@pytest.fixture(scope="module", params=["typed fields", "tensor content over mutual TLS"])
def server(request: pytest.FixtureRequest, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    scratch = tmp_path_factory.mktemp("server")
    options, credentials, settings = ["--version-policy=all"], None, {}
    if request.param != "typed fields":
        tls_options, credentials, settings = mutual_tls(scratch)
        options += ["--enable-serialization-as-tensor-content", *tls_options]
    with running_model_server(models, scratch, *options) as process:
        yield Server(process, credentials, settings)


def mutual_tls(directory: Path) -> tuple[list[str], grpc.ChannelCredentials, dict[str, Path]]:
    """Options for the server, and for a client that it trusts credentials and the gateway's settings."""
    authority = trustme.CA()
    leaf, client = authority.issue_cert("127.0.0.1", "localhost"), authority.issue_cert("gateway.test")
    key, chain, roots = directory / "key.pem", directory / "cert.pem", authority.cert_pem.bytes()
    key.write_bytes(leaf.private_key_pem.bytes())
    chain.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    (directory / "ca.pem").write_bytes(roots)
    own_chain = b"".join(pem.bytes() for pem in client.cert_chain_pems)
    credentials = grpc.ssl_channel_credentials(roots, client.private_key_pem.bytes(), own_chain)
    names = {"tf_serving_ca": "ca", "tf_serving_key": "client-key", "tf_serving_cert": "client-cert"}
    settings = {setting: directory / f"{name}.pem" for setting, name in names.items()}
    settings["tf_serving_key"].write_bytes(client.private_key_pem.bytes())
    settings["tf_serving_cert"].write_bytes(own_chain)
    options = [f"--tls-key={key}", f"--tls-cert={chain}", f"--tls-client-ca={directory / 'ca.pem'}"]
    return options, credentials, settings


async def test_finds_every_model_and_version(server: Server) -> None:
    async with executor_of(server.address, "sums", "wide", credentials=server.credentials) as executor:
        assert set(executor.versions()) == {ONE, TWO, VersionKey("wide", 1)}
        version = executor.versions()[VersionKey("wide", 1)]
        assert (version.input_dim, version.output_dim, version.state_size) == (5, 5, 5)
        assert (version.fingerprint, version.task) == ("wide-1.0", "sum")
        assert version.state_layout[0].name == "sums"
        assert executor.newest("sums") == TWO


async def test_the_gateway_s_settings_say_whom_it_trusts_and_who_it_is(server: Server) -> None:
    executor = make_executor(Settings(tf_serving=server.address, model=["sums"], **server.settings))
    await executor.start()
    assert executor.newest("sums") == TWO
    await executor.close()


@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (3, 7), (64, 1), (0, 1)])
async def test_steps_as_the_model_does(server: Server, rows: int, steps: int) -> None:
    async with executor_of(server.address, credentials=server.credentials) as executor:
        batch = random_batch(rows, steps, seed=rows)
        assert_close(await executor.step(ONE, batch), expected(batch))
        doubled = await executor.step(TWO, batch)
        assert_close(doubled, expected(batch, scale=2.0))
        doubled.state[:] = 0  # the caller's own
        doubled.outputs[:] = 0


async def test_many_batches_at_once_do_not_mix(server: Server) -> None:
    # Both its addresses, of which it listens on one alone; its certificate is checked against the name.
    target = f"dns:///localhost:{server.process.port}"
    async with executor_of(target, credentials=server.credentials, max_in_flight=8) as executor:
        assert executor.max_in_flight == 8
        batches = [random_batch(4, 3, seed=seed) for seed in range(60)]
        results = await asyncio.gather(*(executor.step(ONE, batch) for batch in batches))
        for batch, result in zip(batches, results, strict=True):
            assert_close(result, expected(batch))


async def test_a_killed_model_server_comes_back_as_itself_and_then_as_another(models: Path, tmp_path: Path) -> None:
    """As itself it costs no step. As another model under the same number no step may run on it, not one under way."""
    other = tmp_path / "other"
    export_sums(other, version=2, scale=7.0)
    process = start_model_server(models, tmp_path)
    outcomes: list[str] = []

    async def steps(executor: TfServingExecutor, seed: int) -> None:
        batch = random_batch(4, 3, seed)
        while "gone" not in outcomes[-4:]:
            try:
                assert_close(await executor.step(TWO, batch), expected(batch, scale=2.0))
                outcomes.append("ok")
            except ModelVersionUnavailable:
                outcomes.append("gone")

    async def restart(directory: Path) -> ModelServer:
        process.kill()
        # Versions stay listed while it is away: their sessions are to wait, not to fail for good.
        await until(lambda: not executor._replicas.settled())
        assert TWO in executor.versions()
        return await asyncio.to_thread(start_model_server, directory, tmp_path, port=process.port)

    try:
        async with executor_of(process.address, patience=60.0, timeout=60.0, hold=1.0) as executor:
            workers = [asyncio.create_task(steps(executor, seed)) for seed in range(4)]
            await until(lambda: len(outcomes) > 50)
            process = await restart(models)
            before = len(outcomes)
            await until(lambda: len(outcomes) > before + 50, 30)
            assert "gone" not in outcomes
            process = await restart(other)
            await asyncio.gather(*workers)
            assert TWO not in executor.versions()  # held back until nothing of the first can be left
            await until(lambda: TWO in executor.versions())
            assert executor.versions()[TWO].fingerprint == "sums-7.0"
            batch = random_batch(2, 2)
            assert_close(await executor.step(TWO, batch), expected(batch, scale=7.0))
    finally:
        process.kill()


async def test_a_hung_model_server_costs_the_time_limit_and_no_more(server: Server) -> None:
    async with executor_of(server.address, credentials=server.credentials, timeout=1.0) as executor:
        batch = random_batch(2, 2)
        await executor.step(ONE, batch)
        server.process.process.send_signal(signal.SIGSTOP)
        try:
            began = asyncio.get_running_loop().time()
            with pytest.raises(ExecutorUnavailable):
                await executor.step(ONE, batch)
            assert asyncio.get_running_loop().time() - began < 5
            assert ONE in executor.versions()
        finally:
            server.process.process.send_signal(signal.SIGCONT)
        await until(lambda: all(replica.responsive for replica in executor._replicas._replicas.values()))
        assert_close(await executor.step(ONE, batch), expected(batch))


async def test_two_replicas_through_a_roll_a_hang_and_a_death(models: Path, tmp_path: Path) -> None:
    rolled = tmp_path / "rolled"
    export_sums(rolled)
    batch = random_batch(3, 2)
    with (
        running_model_server(models, tmp_path / "a", "--version-policy=all") as both,
        running_model_server(rolled, tmp_path / "b", "--file-system-poll-wait-seconds=0.1") as latest,
    ):
        async with executor_of(f"{both.address},{latest.address}", timeout=20.0) as executor:
            await until(lambda: executor._replicas.settled() and set(executor.versions()) == {ONE, TWO})
            assert executor.newest("sums") == ONE  # the other one has no version 2 yet
            export_sums(rolled, version=2, scale=2.0)
            await until(lambda: executor.newest("sums") == TWO)  # there the policy is 'latest': version 1 is gone
            for _ in range(4):  # whichever is asked first
                assert_close(await executor.step(ONE, batch), expected(batch))
                assert_close(await executor.step(TWO, batch), expected(batch, scale=2.0))
            latest.process.send_signal(signal.SIGSTOP)
            try:
                for _ in range(4):
                    assert_close(await executor.step(TWO, batch), expected(batch, scale=2.0))
            finally:
                latest.process.send_signal(signal.SIGCONT)
            both.kill()
            for _ in range(4):
                assert_close(await executor.step(TWO, batch), expected(batch, scale=2.0))
        assert latest.stop() == 0


async def test_newest_is_what_every_replica_has() -> None:
    old, new = FakeModelServer(), FakeModelServer()
    old.fingerprints = {1: "one", 2: "two"}
    new.fingerprints = {2: "two", 3: "three"}
    async with (
        running(old) as first,
        running(new) as second,
        executor_of(f"127.0.0.1:{first},127.0.0.1:{second}") as executor,
    ):
        await until(lambda: len(executor.versions()) == 3)
        assert executor.newest("sums") == TWO
        old.fingerprints = {2: "two", 3: "three"}
        await until(lambda: executor.newest("sums") == VersionKey("sums", 3))
        assert executor.newest("other") is None


def test_options_are_checked() -> None:
    for target in ("", " , ", "localhost", "dns:///name", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:1,other"):
        with pytest.raises(ValueError, match=r"expected (HOST:PORT|an address)"):
            TfServingExecutor(target, models=["m"])
    with pytest.raises(ValueError, match="at least one model"):
        TfServingExecutor("127.0.0.1:1", models=[])
