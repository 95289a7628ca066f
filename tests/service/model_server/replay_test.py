"""Every recorded call, made again to ntm-model-server: same code, same message, same response.

What is not replayed stands in ``LEFT_OUT``, with the reason; a test checks that the list is exact.
"""

import itertools
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from tests.service.model_server import recordings
from tests.service.model_server.processes import ModelServer, running_model_server, wait_until
from tests.service.model_server.recordings import Row, call, differences

FILES = sorted(path.stem for path in (recordings.DIRECTORY / "cases").glob("*.json"))
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

_REST = "the REST API is not offered"
LEFT_OUT = {
    "rest/v1/models/echo": _REST,
    "rest/v1/models/echo/metadata": _REST,
    "rest/v1/models/echo:predict": _REST,
    "rest/v1/models/nope:predict": _REST,
    "rest/v1/models/echo/versions/9:predict": _REST,
    "sigterm_with_request_in_flight": "on purpose: SIGTERM drains here, TensorFlow Serving ignores it",
}
# Observations that are not one call: each has a test of its own, below or in core_test.py.
TESTED_APART = {
    "counter_200_concurrent_assign_add",
    "hot_load_v3_under_traffic",
    "unload_with_request_in_flight",
    "concurrent_slow_3_default_grpc_max_threads_8",
    "concurrent_slow_6_default_grpc_max_threads_8",
    "concurrent_slow_8_default_grpc_max_threads_8",
    "concurrent_slow_16_default_grpc_max_threads_8",
    "deadline_50ms_on_slow_run",
    "startup_corrupt_model_retries0",
    "startup_corrupt_plus_good_retries0",
    "startup_empty_dir",
    "startup_bad_config_text",
    "startup_label_on_unavailable",
}
CALLS = {
    "predict_gzip": {"compression": grpc.Compression.Gzip},
    "predict_client_metadata": {"metadata": (("x-request-id", "42"),)},
    "deadline_1ms": {"timeout": 0.001},
}
# How long a call that was recorded as never answered is waited for.
PATIENCE = 1.5


def copy_models(target: Path) -> Path:
    shutil.copytree(recordings.DIRECTORY / "models", target)
    return target


def corrupt_version(source: Path, target: Path) -> None:
    """A version whose variables are cut off, there all at once."""
    half = target.with_name(f".{target.name}")
    shutil.copytree(source, half)
    os.truncate(half / "variables" / "variables.data-00000-of-00001", 10)
    target.parent.mkdir(exist_ok=True)
    half.rename(target)


def publish_version(source: Path, target: Path) -> None:
    half = target.parent / f".{target.name}"
    shutil.copytree(source, half)
    half.rename(target)


def config_file(directory: Path, models: Path, *names: str, extra: Mapping[str, str] | None = None) -> Path:
    entries = [
        f'config {{ name: "{name}" base_path: "{models / name}" model_platform: "tensorflow" '
        f"{(extra or {}).get(name, '')} }}"
        for name in names
    ]
    path = directory / "models.config"
    path.write_text("\n".join(["model_config_list {", *entries, "}"]))
    return path


def replay(channel: grpc.Channel, rows: list[Row], models: Path, hooks: Mapping[str, Callable[[], None]]) -> str:
    """Makes the calls in order. What asks only is asked again for a while: the recorder, too, waited for effects."""
    found: list[str] = []
    for row in rows:
        if row.case in LEFT_OUT or (row.case in TESTED_APART and row.case not in hooks):
            continue
        hooks.get(row.case, lambda: None)()
        if row.case in TESTED_APART:
            continue
        options = dict(CALLS.get(row.case, {}))
        if row.fields["code"] == "DEADLINE_EXCEEDED":
            options.setdefault("timeout", PATIENCE)
        problems = _eventually(channel, row, models, options)
        found.extend(problems)
    return "\n".join(found)


def _eventually(channel: grpc.Channel, row: Row, models: Path, options: dict[str, object]) -> list[str]:
    problems: list[str] = []

    def same() -> bool:
        reply = call(channel, row, models, **options)
        problems[:] = differences(row, reply, models)
        waits = row.asks_only or "NOT_FOUND" in {reply.code, row.fields["code"]}
        return not problems or not waits

    try:
        wait_until(same, 5.0)
    except AssertionError:
        assert problems
    return problems


@pytest.fixture(scope="module")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ModelServer, Path]]:
    scratch = tmp_path_factory.mktemp("default")
    models = copy_models(scratch / "models")
    config = config_file(scratch, models, "echo", "counter", "jit", "big", "misc")
    options = ("--allow-reload", "--model-config-file", str(config), "--grpc-max-threads", "8")
    with running_model_server(models, scratch, *options) as server:
        yield server, models


@pytest.fixture
def channel(default_server: tuple[ModelServer, Path]) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(default_server[0].address, options=UNLIMITED) as opened:
        yield opened


def test_left_out_rows_are_exactly_those_listed() -> None:
    without_rpc = {row.case for file in FILES for row in recordings.rows(file) if not row.rpc}
    assert without_rpc == set(LEFT_OUT) | TESTED_APART


def test_basic_calls(channel: grpc.Channel, default_server: tuple[ModelServer, Path]) -> None:
    assert replay(channel, recordings.rows("a_basic"), default_server[1], {}) == ""


def test_default_client_limits(default_server: tuple[ModelServer, Path]) -> None:
    with grpc.insecure_channel(default_server[0].address) as limited:
        assert replay(limited, recordings.rows("a_default_client_limits"), default_server[1], {}) == ""


def test_xla_is_off_by_default(channel: grpc.Channel, default_server: tuple[ModelServer, Path]) -> None:
    assert replay(channel, recordings.rows("e_jit_default_flags"), default_server[1], {}) == ""


def test_lifecycle(channel: grpc.Channel, default_server: tuple[ModelServer, Path]) -> None:
    rows = recordings.rows("b_lifecycle")
    bump = next(row for row in rows if row.case == "counter_bump_0")

    def bump_200_times() -> None:
        with ThreadPoolExecutor(6) as threads:
            replies = list(threads.map(lambda _: call(channel, bump, default_server[1]), range(200)))
        assert {reply.code for reply in replies} == {"OK"}

    hooks = {"counter_200_concurrent_assign_add": bump_200_times}
    assert replay(channel, rows, default_server[1], hooks) == ""


def test_requests_in_flight_and_thread_limit(channel: grpc.Channel, default_server: tuple[ModelServer, Path]) -> None:
    _, models = default_server
    rows = recordings.rows("g_inflight_and_lifecycle")
    slow = next(row for row in rows if row.case == "slow_alone")
    status = Row("", "/tensorflow.serving.ModelService/GetModelStatus", {"request": {"model_spec": {"name": "batchy"}}})
    threads = ThreadPoolExecutor(16)

    def states() -> list[int]:
        kind = recordings._TYPES[status.rpc][1]
        return [entry.state for entry in kind.FromString(call(channel, status, models).response).model_version_status]

    def unload_in_flight() -> None:
        # The reload that unloads came in the row before; here the whole of it once more, with a call under way.
        reload_row = next(row for row in rows if row.case == "reload_unload_while_inflight")
        add_row = next(row for row in rows if row.case == "reload_add_batchy_again")
        for _ in range(20):
            assert call(channel, add_row, models).code == "OK"
            before = states()
            flying = threads.submit(call, channel, slow, models)
            assert call(channel, reload_row, models).code == "OK"
            seen = [before]
            wait_until(lambda seen=seen: seen.append(states()) or seen[-1] == [50])
            passed = [state for pair in itertools.pairwise(seen) if pair[0] != pair[1] for state in pair[1]]
            assert call(channel, slow, models).message == "Servable not found for request: Latest(batchy)"
            reply = flying.result()
            if passed != [50]:
                break
            # Nothing was under way that the version had to wait for: either the call was through already, or the reload
            # was there before it.
            assert reply.code in ("OK", "NOT_FOUND")
        assert passed == [40, 50]  # UNLOADING while the call is under way, then END
        assert reply.code == "OK"

    def concurrently(count: int) -> Callable[[], None]:
        recorded = next(row for row in rows if row.case == f"concurrent_slow_{count}_default_grpc_max_threads_8")

        def check() -> None:
            replies = list(threads.map(lambda _: call(channel, slow, models), range(count)))
            counted = Counter((reply.code, reply.message) for reply in replies)
            assert counted == {(code, message): number for code, message, number in recorded.fields["codes"]}

        return check

    def deadline() -> None:
        reply = call(channel, slow, models, timeout=0.05)
        assert (reply.code, reply.message) == ("DEADLINE_EXCEEDED", "Deadline Exceeded")

    hooks = {
        "unload_with_request_in_flight": unload_in_flight,
        "deadline_50ms_on_slow_run": deadline,
    } | {f"concurrent_slow_{count}_default_grpc_max_threads_8": concurrently(count) for count in (3, 6, 8, 16)}
    try:
        assert replay(channel, rows, models, hooks) == ""
    finally:
        threads.shutdown()


def test_output_filter_and_state(channel: grpc.Channel, default_server: tuple[ModelServer, Path]) -> None:
    _, models = default_server
    rows = recordings.rows("g_inflight_and_lifecycle")
    fresh = [row for row in rows if row.case in {"reload_unload_while_inflight", "reload_add_batchy_again"}]
    assert replay(channel, fresh, models, {}) == ""  # batchy counts rows: it has to be loaded anew
    assert replay(channel, recordings.rows("h_filter_and_state"), models, {}) == ""


def test_versions_that_come_and_go(tmp_path: Path) -> None:
    models = copy_models(tmp_path / "models")
    echo, aside = models / "echo", tmp_path / "aside"
    config = config_file(tmp_path, models, "echo", "counter", "jit", "big", "misc")
    rows = recordings.rows("c_hotload_wedge")
    predict = next(row for row in rows if row.case == "predict_echo_meanwhile")

    def hot_load() -> None:
        stop = threading.Event()
        replies = []

        def traffic() -> None:
            while not stop.is_set():
                replies.append(call(channel, predict, models))

        thread = threading.Thread(target=traffic)
        thread.start()
        try:
            publish_version(echo / "2", echo / "3")
            wait_until(lambda: replies and b"\x12\x02\x08\x03" in replies[-1].response)  # model_spec.version 3
        finally:
            stop.set()
            thread.join()
        assert {reply.code for reply in replies} == {"OK"}

    def all_gone() -> None:
        aside.mkdir()
        for version in ("1", "2"):
            (echo / version).rename(aside / version)

    def back_and_empty() -> None:
        for version in ("1", "2"):
            (aside / version).rename(echo / version)
        (models / "empty").mkdir()

    hooks = {
        "hot_load_v3_under_traffic": hot_load,
        "status_after_delete_v3_dir": lambda: shutil.rmtree(echo / "3"),
        "predict_after_all_dirs_gone": all_gone,
        "reload_empty_base_dir": back_and_empty,
        "status_empty_after_version_appears": lambda: publish_version(echo / "2", models / "empty" / "1"),
        "reload_corrupt_model": lambda: corrupt_version(echo / "2", models / "corrupt" / "1"),
        "status_corrupt_v4": lambda: corrupt_version(echo / "2", echo / "4"),
        "status_after_remove_v4": lambda: shutil.rmtree(echo / "4"),
    }
    options = ("--allow-reload", "--model-config-file", str(config))
    with running_model_server(models, tmp_path, *options) as server:
        with grpc.insecure_channel(server.address, options=UNLIMITED) as channel:
            assert replay(channel, rows, models, hooks) == ""
        assert server.stop() == 0  # with a load that is still being tried again


def test_xla_on_and_labels_from_the_start(tmp_path: Path) -> None:
    models = copy_models(tmp_path / "models")
    corrupt_version(models / "echo" / "2", models / "bad" / "1")
    labelled = 'model_version_policy { all {} } version_labels { key: "stable" value: 1 }'
    config = config_file(tmp_path, models, "echo", "jit", "counter", extra={"echo": labelled})
    options = (
        "--allow-reload",
        "--xla-cpu-compilation-enabled",
        "--allow-version-labels-for-unavailable-models",
        "--max-num-load-retries=0",
        "--model-config-file",
        str(config),
    )
    with (
        running_model_server(models, tmp_path, *options) as server,
        grpc.insecure_channel(server.address, options=UNLIMITED) as channel,
    ):
        assert replay(channel, recordings.rows("e_jit_xla_enabled"), models, {}) == ""
