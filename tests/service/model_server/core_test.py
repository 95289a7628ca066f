"""Start-up, configurations and where models may come from. The texts are those of a recorded TensorFlow Serving."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import text_format
from tensorflow_serving.apis import model_pb2
from tensorflow_serving.config import model_server_config_pb2

from service.model_server.config import Settings
from service.model_server.core import ServerCore
from service.model_server.errors import ServingError
from service.model_server.manager import LoadPolicy
from service.model_server.server import _configuration, _core
from service.model_server.source import aspired, discover, version_policy
from service.model_server.states import State
from tests.service.model_server import recordings
from tests.service.model_server.processes import START_LIMIT, start_model_server, wait_until
from tests.service.model_server.recordings import Row
from tests.service.model_server.replay_test import config_file, copy_models, corrupt_version, publish_version


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return copy_models(tmp_path / "models")


@pytest.fixture
def core(models: Path) -> Iterator[ServerCore]:
    made = ServerCore(models, poll_interval=0.05, load_policy=LoadPolicy(0, 0.0))
    yield made
    made.close()


def config_of(*entries: str) -> Any:
    text = "model_config_list { %s }" % " ".join(f"config {{ {entry} }}" for entry in entries)  # noqa: UP031 - braces
    return text_format.Parse(text, model_server_config_pb2.ModelServerConfig())


def entry(models: Path, name: str, extra: str = "") -> str:
    return f'name: "{name}" base_path: "{models / name}" model_platform: "tensorflow" {extra}'


def recorded(case: str, models: Path) -> str:
    """The last line that a recorded server wrote before it ended."""
    row: Row = next(row for row in recordings.rows("g_inflight_and_lifecycle") if row.case == case)
    assert row.fields["rc"] == 255
    line: str = row.fields["tail"][-1]
    return line.removeprefix("Failed to start server. Error: ").replace("MODELS/", f"{models}/")


@pytest.mark.parametrize("with_good", [False, True])
def test_a_corrupt_model_fails_the_start(core: ServerCore, models: Path, with_good: bool) -> None:
    corrupt_version(models / "echo" / "2", models / "bad" / "1")
    case = "startup_corrupt_plus_good_retries0" if with_good else "startup_corrupt_model_retries0"
    entries = [entry(models, "bad"), *([entry(models, "echo")] if with_good else [])]
    with pytest.raises(ServingError) as raised:
        core.start(config_of(*entries))
    assert str(raised.value) == recorded(case, models)


def test_a_label_on_a_version_that_is_not_there_fails_the_start(core: ServerCore, models: Path) -> None:
    label = 'model_version_policy { specific { versions: 1 } } version_labels { key: "stable" value: 2 }'
    with pytest.raises(ServingError) as raised:
        core.start(config_of(entry(models, "echo", label)))
    assert str(raised.value) == recorded("startup_label_on_unavailable", models)


def test_a_model_without_a_directory_is_waited_for(core: ServerCore, models: Path) -> None:
    starting = threading.Thread(target=core.start, args=(config_of(entry(models, "nodir"), entry(models, "echo")),))
    starting.start()
    wait_until(
        lambda: core.monitor.versions("echo")[2].state is State.AVAILABLE if core.monitor.versions("echo") else 0
    )
    assert starting.is_alive()  # and the port closed: it opens after this
    (models / "nodir").mkdir()
    publish_version(models / "echo" / "2", models / "nodir" / "1")
    starting.join(10)
    assert not starting.is_alive()


def test_a_process_that_cannot_start_says_so_and_exits_with_255(models: Path, tmp_path: Path) -> None:
    config = tmp_path / "models.config"
    config.write_text("model_config_list { config { name: ")
    with pytest.raises(AssertionError) as raised:
        start_model_server(models, tmp_path / "scratch", "--model-config-file", str(config))
    wanted = recorded("startup_bad_config_text", models).replace("CONFIG", str(config))
    assert f"Failed to start server. Error: {wanted}\n" in str(raised.value)
    assert "exit status 255" in str(raised.value)
    assert START_LIMIT > 0


def test_reload_stays_inside_of_the_model_directory(core: ServerCore, models: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(models / "echo", outside)
    (models / "link").symlink_to(outside)
    core.start(config_of(entry(models, "echo")))
    for base_path in (outside, models / "link", models / ".." / "outside", models, "gs://bucket/echo", "/"):
        with pytest.raises(ServingError, match=r"PERMISSION_DENIED: base_path .* is outside of"):
            core.reload(config_of(f'name: "x" base_path: "{base_path}" model_platform: "tensorflow"'))
    assert core.monitor.versions("echo")[2].state is State.AVAILABLE


def test_configurations_that_are_refused_change_nothing(core: ServerCore, models: Path) -> None:
    core.start(config_of(entry(models, "echo")))
    twice = config_of(entry(models, "echo"), entry(models, "echo"))
    other = config_of(f'name: "echo" base_path: "{models / "echo"}" model_platform: "other"')
    unknown = config_of(f'name: "new" base_path: "{models / "echo"}" model_platform: "other"')
    both = config_of(entry(models, "new", "model_type: TENSORFLOW"))
    for config, text in (
        (twice, "INVALID_ARGUMENT: Illegal to list model echo multiple times in config list"),
        (
            other,
            "INVALID_ARGUMENT: Illegal to change a model's platform. For model echo platform was tensorflow "
            "and new platform requested is other",
        ),
        (unknown, "INVALID_ARGUMENT: Model new requests unsupported platform other"),
        (
            both,
            "INVALID_ARGUMENT: Illegal setting both ModelServerConfig::model_type (deprecated) "
            "and ModelServerConfig::model_platform.",
        ),
    ):
        with pytest.raises(ServingError) as raised:
            core.reload(config)
        assert str(raised.value) == text
    assert {state.state for state in core.monitor.versions("echo").values()} == {State.AVAILABLE}


def test_models_that_appear_later_are_found_without_a_config_file(core: ServerCore, models: Path) -> None:
    shutil.rmtree(models / "jit")
    policy = version_policy("latest:2")
    core.start(discover(models, policy), lambda: discover(models, policy))
    assert set(core.monitor.versions("echo")) == {1, 2}
    assert not core.monitor.versions("late")
    (models / "late").mkdir()
    publish_version(models / "misc" / "1", models / "late" / "7")
    wait_until(lambda: 7 in core.monitor.versions("late"))
    core.reload(config_of(entry(models, "echo")))  # from now on it is this, and nothing else
    wait_until(lambda: core.monitor.versions("late")[7].state is State.END)


@pytest.mark.parametrize(
    ("policy", "wanted"),
    [
        ("latest", [12]),
        ("latest:2", [3, 12]),
        ("all", [1, 3, 12]),
        ("specific:1,12,99", [1, 12]),
    ],
)
def test_policies_pick_versions_by_number(tmp_path: Path, policy: str, wanted: list[int]) -> None:
    for name in ("1", "3", "0012", ".4", "5.tmp", "x", ""):
        (tmp_path / name).mkdir(exist_ok=True)
    found = aspired(tmp_path, version_policy(policy))
    assert sorted(found) == wanted
    assert 12 not in found or found[12].name == "0012"


def test_an_empty_model_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match=r"no model in .*: expected MODEL/VERSION/saved_model.pb"):
        _configuration(Settings(model_dir=tmp_path))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"listen": "8500"}, "expected HOST:PORT"),
        ({"listen": "0.0.0.0:8500"}, "would be open to everybody"),
        ({"version_policy": "newest"}, "expected 'latest'"),
        ({"tls_cert": "x"}, "go together"),
        ({"tls_client_ca": "x"}, "needs --tls-cert"),
        ({"model_dir": "/nonexistent"}, "is not a directory"),
        ({"grpc_max_threads": 1}, "greater than or equal to 2"),
    ],
)
def test_settings_are_checked(tmp_path: Path, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Settings(**({"model_dir": tmp_path} | options))


def test_settings_that_open_the_port_to_others_are_taken_when_asked_for(tmp_path: Path) -> None:
    assert Settings(model_dir=tmp_path, listen="0.0.0.0:8500", insecure=True).insecure


@pytest.mark.parametrize(("options", "threads"), [({}, 1), ({"tensorflow_intra_op_parallelism": 3}, 3)])
def test_graphs_run_their_operations_on_as_many_threads_as_the_settings_say(
    models: Path, options: dict[str, Any], threads: int
) -> None:
    # Switched off, XLA would be so for all of this process.
    settings = Settings(model_dir=models, enable_model_warmup=False, xla_cpu_compilation_enabled=True, **options)
    core = _core(settings)
    try:
        core.start(config_of(entry(models, "echo")))
        with core.use(model_pb2.ModelSpec(name="echo")) as handle:
            config = handle.servable._session._config
            assert (config.intra_op_parallelism_threads, config.inter_op_parallelism_threads) == (threads, 0)
    finally:
        core.close()


def test_a_config_file_is_taken_as_it_is(models: Path, tmp_path: Path) -> None:
    file = config_file(tmp_path, models, "echo", "misc")
    config, find = _configuration(Settings(model_dir=models, model_config_file=file))
    assert [model.name for model in config.model_config_list.config] == ["echo", "misc"]
    assert find is None
