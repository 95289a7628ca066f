"""The TensorFlow Serving executor against real model server processes, and against one that answers nonsense."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
import trustme

from service.backends import make_executor
from service.config import Settings
from service.errors import BadModelOutput, ExecutorUnavailable, ModelLoadError, ModelVersionUnavailable
from service.executors.serving_messages import decode_predict, encode_predict, float_output
from service.executors.serving_protos import predict_pb2
from service.executors.tf_serving import TfServingExecutor
from service.types import VersionKey
from tests.service.executors.fake_model_server import FakeModelServer, reply, running
from tests.service.executors.sequence_models import WIDTH, assert_close, expected, export_sums, random_batch
from tests.service.model_server.processes import ModelServer, running_model_server, start_model_server

ONE = VersionKey("sums", 1)
TWO = VersionKey("sums", 2)


@contextlib.asynccontextmanager
async def executor_of(target: str, *models: str, **options: Any) -> AsyncIterator[TfServingExecutor]:
    quick: dict[str, Any] = {"poll_interval": 0.05, "probe_timeout": 0.5, "start_timeout": 20.0}
    executor = TfServingExecutor(target, models=models or ("sums",), **(quick | options))
    try:
        await executor.start()
        yield executor
    finally:
        await executor.close()


async def until(condition: Any, limit: float = 10.0) -> None:
    async with asyncio.timeout(limit):
        while not condition():  # noqa: ASYNC110 - other processes set no event of ours
            await asyncio.sleep(0.01)


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


def _float(request: Any, name: str) -> Any:
    tensor = request.inputs[name]
    shape = [dim.size for dim in tensor.tensor_shape.dim]
    return np.frombuffer(tensor.tensor_content, np.float32).reshape(shape)


def _honest(request: Any) -> Any:
    return reply(request, outputs=_float(request, "inputs"), state=_float(request, "state"))


def _wrong_rank(request: Any) -> Any:
    return reply(request, outputs=_float(request, "inputs")[:, 0], state=_float(request, "state"))


def _wrong_rows(request: Any) -> Any:
    return reply(request, outputs=_float(request, "inputs"), state=_float(request, "state")[:-1])


def _missing(request: Any) -> Any:
    return reply(request, outputs=_float(request, "inputs"))


def _other_dtype(request: Any) -> Any:
    response = _honest(request)
    response.outputs["state"].dtype = 2
    return response


def _unknown_dtype(request: Any) -> Any:
    response = _honest(request)
    response.outputs["state"].dtype = 77
    return response


def _too_few_values(request: Any) -> Any:
    response = _honest(request)
    del response.outputs["state"].float_val[1:]
    return response


def _torn_content(request: Any) -> Any:
    response = _honest(request)
    response.outputs["state"].tensor_content = b"\0\0\0"
    return response


def _other_version(request: Any) -> Any:
    response = _honest(request)
    response.model_spec.version.value = 7
    return response


@pytest.mark.parametrize(
    "garble",
    [
        _wrong_rank,
        _wrong_rows,
        _missing,
        _other_dtype,
        _unknown_dtype,
        _too_few_values,
        _torn_content,
        _other_version,
        lambda request: b"\xff\xff\xff\xff",
        lambda request: b"",
    ],
)
async def test_nonsense_is_bad_model_output(garble: Any) -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        garbled = garble(request)
        return garbled if isinstance(garbled, bytes) else garbled.SerializeToString()

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        with pytest.raises(BadModelOutput):
            await executor.step(ONE, random_batch(3, 2))
        assert fake.steps == 1  # it is not asked again: the answer would be the same
        garble = _honest
        await executor.step(ONE, random_batch(3, 2))


@pytest.mark.parametrize(
    ("code", "error", "retried"),
    [
        (grpc.StatusCode.UNAVAILABLE, None, True),
        (grpc.StatusCode.NOT_FOUND, None, True),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, None, True),
        (grpc.StatusCode.INVALID_ARGUMENT, BadModelOutput, False),
        (grpc.StatusCode.INTERNAL, BadModelOutput, False),
        (grpc.StatusCode.FAILED_PRECONDITION, BadModelOutput, False),
        (grpc.StatusCode.DEADLINE_EXCEEDED, ExecutorUnavailable, False),
        (grpc.StatusCode.PERMISSION_DENIED, ExecutorUnavailable, False),
        (grpc.StatusCode.UNIMPLEMENTED, ExecutorUnavailable, False),
    ],
)
async def test_what_each_status_means(code: grpc.StatusCode, error: type[Exception] | None, retried: bool) -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        if fake.steps <= 3:
            await context.abort(code, "secret text of the model server")
        return _honest(request).SerializeToString()

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        batch = random_batch(3, 2)
        if retried:
            np.testing.assert_array_equal((await executor.step(ONE, batch)).state, batch.state)
            assert fake.steps == 4
        else:
            with pytest.raises(error or Exception) as raised:
                await executor.step(ONE, batch)
            assert fake.steps == 1
            assert "secret" not in str(raised.value)  # clients see this message


async def test_a_busy_model_server_is_waited_for_until_the_time_limit() -> None:
    fake = FakeModelServer()

    async def answer(request: Any, context: Any) -> bytes:
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "Server Threadpool Exhausted")
        raise AssertionError

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}", timeout=0.5) as executor:
        with pytest.raises(ExecutorUnavailable):
            await executor.step(ONE, random_batch(1, 1))
        assert 3 < fake.steps < 50  # it is asked ever more seldom


async def test_a_cancelled_step_is_cancelled_at_the_model_server_too() -> None:
    fake = FakeModelServer()
    arrived, cancelled = asyncio.Event(), asyncio.Event()

    async def answer(request: Any, context: Any) -> bytes:
        arrived.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        raise AssertionError

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        step = asyncio.create_task(executor.step(ONE, random_batch(1, 1)))
        await arrived.wait()
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        async with asyncio.timeout(5):
            await cancelled.wait()


async def test_close_waits_for_steps_under_way_and_may_be_called_twice() -> None:
    fake = FakeModelServer()
    arrived, go = asyncio.Event(), asyncio.Event()

    async def answer(request: Any, context: Any) -> bytes:
        arrived.set()
        await go.wait()
        return _honest(request).SerializeToString()

    fake.answer = answer
    async with running(fake) as port, executor_of(f"127.0.0.1:{port}") as executor:
        step = asyncio.create_task(executor.step(ONE, random_batch(1, 1)))
        await arrived.wait()
        closing = asyncio.create_task(executor.close())
        await asyncio.sleep(0)
        assert not closing.done()
        go.set()
        await step
        await closing


@pytest.mark.parametrize(
    "text",
    [
        b"not json",
        b"[]",
        b"{}",
        b'{"fingerprint": "f", "input_dim": 0, "output_dim": 1, "state_layout": []}',
        b'{"fingerprint": "f", "input_dim": 1, "output_dim": 1, "state_size": 2, "state_layout": '
        b'[{"name": "a", "shape": [2], "offset": 1}]}',
        b'{"fingerprint": "f", "input_dim": 1, "output_dim": 1, "state_size": 3, "state_layout": '
        b'[{"name": "a", "shape": [2], "offset": 0}]}',
        b'{"fingerprint": "f", "input_dim": true, "output_dim": 1, "state_size": 2, "state_layout": '
        b'[{"name": "a", "shape": [2], "offset": 0}]}',
    ],
)
async def test_a_model_that_describes_itself_wrongly_is_not_served(text: bytes) -> None:
    fake = FakeModelServer()
    fake.text = text
    async with running(fake) as port:
        with pytest.raises(ModelLoadError, match=r"sums/1: its .*"):
            async with executor_of(f"127.0.0.1:{port}", start_timeout=0.3):
                pass


async def test_start_says_what_was_looked_for_and_where() -> None:
    with pytest.raises(ModelLoadError, match=r"no version of sums .*127\.0\.0\.1:1: UNAVAILABLE"):
        async with executor_of("127.0.0.1:1", start_timeout=0.3):
            pass
    fake = FakeModelServer("other")
    async with running(fake) as port:
        with pytest.raises(ModelLoadError, match=rf"no version of sums .*127\.0\.0\.1:{port}: sums: not served"):
            async with executor_of(f"127.0.0.1:{port}", start_timeout=0.3):
                pass
    with pytest.raises(ModelLoadError, match=r"no address was found for dns:///name\.invalid:8500"):
        async with executor_of("dns:///name.invalid:8500", start_timeout=0.3):
            pass


async def test_unknown_versions_are_refused_at_once() -> None:
    async with running(FakeModelServer()) as port, executor_of(f"127.0.0.1:{port}") as executor:
        with pytest.raises(ModelVersionUnavailable):
            await executor.step(VersionKey("sums", 9), random_batch(1, 1))


def test_nothing_of_tensorflow_is_imported_and_nothing_stands_in_its_way() -> None:
    """In a process of its own: first without TensorFlow, then with it, whose message classes are the same."""
    script = """
        import sys
        import service.executors.tf_serving
        from service.executors import serving_protos
        left = {name for name in sys.modules if name.split(".")[0] == "tensorflow" and not name.endswith("_pb2")}
        assert not left, left
        import tensorflow as tf
        from tensorflow.core.framework import tensor_pb2
        assert tensor_pb2.TensorProto is serving_protos.tensor_pb2.TensorProto
        proto = tf.make_tensor_proto([1.0, 2.0])
        assert isinstance(proto, serving_protos.tensor_pb2.TensorProto)
        assert tf.constant(3) + 4 == 7
        """
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr


def test_tensorflows_generated_modules_are_all_that_is_needed(tmp_path: Path) -> None:
    """As in a gateway image: the other packages, and of TensorFlow the ``*_pb2.py`` files alone."""
    packages = Path(grpc.__file__).parents[1]
    for package in packages.iterdir():
        if not package.name.startswith(("tensorflow-", "keras", "jax", "torch")) and package.name != "tensorflow":
            (tmp_path / package.name).symlink_to(package)
    for file in (packages / "tensorflow").rglob("*_pb2.py"):
        copy = tmp_path / file.relative_to(packages)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    script = """
        import sys
        import service.executors.tf_serving as executor
        assert "tensorflow" not in sys.modules
        import tensorflow
        print(tensorflow.__file__, hasattr(tensorflow, "constant"))
        """
    root = Path(__file__).parents[3]
    command = [sys.executable, "-S", "-P", "-c", textwrap.dedent(script)]
    environment = {"PYTHONPATH": os.pathsep.join([str(root), str(root / "protos"), str(tmp_path)])}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (finished.returncode, finished.stdout) == (0, "None False\n"), finished.stderr


def test_where_tensorflow_is_there_already_its_own_messages_are_used() -> None:
    import tensorflow as tf
    from tensorflow.core.framework import tensor_pb2

    from service.executors import serving_protos

    assert serving_protos.tensor_pb2.TensorProto is tensor_pb2.TensorProto
    assert sys.modules["tensorflow"] is tf


def test_requests_carry_tensor_content() -> None:
    batch = random_batch(2, 3)
    inputs = {"inputs": batch.inputs, "lengths": batch.lengths, "reset": batch.reset, "state": batch.state[::-1]}
    request = predict_pb2.PredictRequest.FromString(encode_predict(TWO, "step", inputs, ["state"]))
    assert (request.model_spec.name, request.model_spec.version.value) == ("sums", 2)
    assert list(request.output_filter) == ["state"]
    assert [dim.size for dim in request.inputs["inputs"].tensor_shape.dim] == [2, 3, WIDTH]
    assert request.inputs["state"].tensor_content == np.ascontiguousarray(batch.state[::-1]).tobytes()
    assert request.inputs["reset"].dtype == 10
    assert not request.inputs["inputs"].float_val


@pytest.mark.parametrize("count", [0, 1, 31, 32, 33, 4096, 164_000])
@pytest.mark.parametrize("extra", ["", "half_val", "int_val", "float8_val"])
def test_typed_floats_are_read_whole_whatever_stands_beside_them(count: int, extra: str) -> None:
    values = np.random.default_rng(count).standard_normal(count).astype(np.float32)
    response = reply(predict_pb2.PredictRequest(), state=values)
    tensor = response.outputs["state"]
    if extra == "float8_val":
        tensor.float8_val = b"1234"
    elif extra:
        getattr(tensor, extra).extend([1, 2, 3])
    prediction = decode_predict(response.SerializeToString())
    came = float_output(prediction, "state", (count,))
    np.testing.assert_array_equal(came, values)
    assert came.flags.writeable


def test_options_are_checked() -> None:
    for target in ("", " , ", "localhost", "dns:///name", "127.0.0.1:x", "127.0.0.1:65536", "127.0.0.1:1,other"):
        with pytest.raises(ValueError, match=r"expected (HOST:PORT|an address)"):
            TfServingExecutor(target, models=["m"])
    with pytest.raises(ValueError, match="at least one model"):
        TfServingExecutor("127.0.0.1:1", models=[])
