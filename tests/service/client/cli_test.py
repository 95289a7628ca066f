"""``ntm-client``, against a real gateway."""

import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.image import imread

from service.client import SequenceClient
from service.client.calls import new_session_id
from service.client.cli import main
from service.client.cli.data import DataError, read_sequence, write_sequence
from tests.service.support import random_inputs, run_whole


@pytest.fixture
def run(gateway, capsys):
    """Runs a command; returns its exit code, what it printed, and its errors."""

    def run(*arguments, json_out=False):
        code = main(["--target", gateway.target, *(["--json"] if json_out else []), *map(str, arguments)])
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if json_out else printed.out, printed.err

    return run


@pytest.fixture
def sequence(tmp_path):
    np.save(tmp_path / "inputs.npy", random_inputs(5))
    return tmp_path / "inputs.npy"


@pytest.fixture
def session_id(gateway):
    with SequenceClient(gateway.target) as client:
        session = client.create_session("sums", session_id="mine")
        session.step(random_inputs(2, seed=1))
    return "mine"


def test_models(run):
    code, printed, _ = run("models")
    assert code == 0
    assert re.search(r"sums\s+1\s+AVAILABLE\s+2\s+3\s+5", printed)
    assert "counters" in run("models", "sums")[1]
    _, (row,), _ = run("models", json_out=True)
    _, behind, _ = run("models", "--json")
    assert json.loads(behind) == [row]
    assert (row["model"], row["version"], row["input_dim"]) == ("sums", 1, 2)
    assert row["state_layout"][0] == {"name": "average", "shape": [2], "axes": ["channel"]}


def test_a_session_from_open_to_delete(run, tmp_path):
    _, opened, _ = run("open", "sums", "--ttl", "100", json_out=True)
    name = opened["session_id"]
    assert (opened["model"], opened["position"]) == ("sums", 0)
    assert name in run("sessions")[1]
    assert [row["session_id"] for row in run("sessions", json_out=True)[1]] == [name]
    _, fork, _ = run("fork", name, json_out=True)
    assert run("snapshot", name, tmp_path / "blob")[0] == 0
    _, restored, _ = run("restore", tmp_path / "blob", json_out=True)
    assert len({name, fork["session_id"], restored["session_id"]}) == 3
    assert run("delete", name)[0] == 0
    assert {row["session_id"] for row in run("sessions", json_out=True)[1]} == {
        fork["session_id"],
        restored["session_id"],
    }


def test_step_prints_csv_that_loses_nothing(run, sequence, gateway):
    code, printed, _ = run("step", "--model", "sums", sequence, "--chunk", "2")
    assert code == 0
    outputs = np.loadtxt(io.StringIO(printed), delimiter=",", dtype=np.float32)
    np.testing.assert_array_equal(outputs, run_whole(random_inputs(5))[0])
    assert not gateway.store._sessions


def test_step_goes_on_with_a_session(run, session_id, sequence, tmp_path):
    code, printed, _ = run("step", "--session", session_id, sequence, "--output", tmp_path / "outputs.npy")
    assert code == 0
    assert re.search(r"position\s+7", printed)
    whole = np.concatenate([random_inputs(2, seed=1), random_inputs(5)])
    np.testing.assert_array_equal(np.load(tmp_path / "outputs.npy"), run_whole(whole)[0][2:])
    code, _, error = run("step", "--session", session_id, sequence, "--position", 3)
    assert code == 1
    assert "POSITION_MISMATCH" in error


def test_step_from_standard_input_and_json_out(run, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("1,2\n\n3,4\n"))
    _, result, _ = run("step", "--model", "sums", "-", "--keep", json_out=True)
    np.testing.assert_allclose(result["outputs"], run_whole(np.array([[1, 2], [3, 4]], np.float32))[0], rtol=1e-6)
    assert result["position"] == 2
    assert [row["session_id"] for row in run("sessions", json_out=True)[1]] == [result["session_id"]]


def test_inspect_tells_saves_and_draws(run, session_id, tmp_path):
    code, printed, _ = run("inspect", session_id, "--picture", tmp_path / "state.png", "--save", tmp_path / "state.npz")
    assert code == 0
    assert re.search(r"average\s+2\s", printed)
    state = run_whole(random_inputs(2, seed=1))[1]
    np.testing.assert_array_equal(np.load(tmp_path / "state.npz")["average"], state[:2])
    assert imread(tmp_path / "state.png").shape[1] > 1000
    _, inspected, _ = run("inspect", session_id, json_out=True)
    np.testing.assert_allclose(inspected["state"]["counters"], [state[3:]], rtol=1e-6)
    code, _, error = run("inspect", session_id, "--picture", tmp_path / "state.docx")
    assert code == 2
    assert "docx" in error


def test_bench(run, gateway):
    code, result, _ = run("bench", "--model", "sums", "--sessions", 8, "--seconds", 0.2, json_out=True)
    assert code == 0
    assert gateway.steps_run() == 8 * (result["rounds"] + 3)  # and three rounds to warm up
    assert result["time_steps_per_s"] == result["chunks_per_s"] > 0
    assert 0 < result["round_p50_ms"] <= result["round_p99_ms"]
    assert not gateway.store._sessions
    assert run("bench", "--model", "sums", "--sessions", 0)[0] == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("models", "nobody"), 1, "NOT_FOUND [MODEL_NOT_FOUND]"),
        (("inspect", "nobody"), 1, "SESSION_NOT_FOUND"),
        (("step", "x.npy"), 2, "either --session ID"),
        (("step", "--model", "sums", "no-such-file.npy"), 2, "no-such-file.npy"),
        (("--cert", "c.pem", "models"), 2, "--cert and --key go together"),
        (("--timeout", "0", "models"), 2, "timeout is 0"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(run, arguments, code, said):
    came, printed, error = run(*arguments)
    assert came == code
    assert said in error
    assert error.count("\n") == 1
    assert not printed


def test_errors_for_programs(run):
    code, document, _ = run("models", "nobody", json_out=True)
    assert code == 1
    assert document["error"]["reason"] == "MODEL_NOT_FOUND"
    assert document["error"]["metadata"] == {"model": "nobody"}


def test_no_id_looks_like_an_option_of_a_command():
    ids = {new_session_id() for _ in range(2000)}
    assert len(ids) == 2000
    assert not any(name.startswith("-") for name in ids)


def test_help_and_usage_of_the_program_itself(gateway):
    program = [sys.executable, "-m", "service.client.cli"]
    shown = subprocess.run([*program, "--help"], capture_output=True, text=True, timeout=60, check=True)
    assert "ntm-client step --model copy" in shown.stdout
    wrong = subprocess.run([*program, "dance"], capture_output=True, text=True, timeout=60, check=False)
    assert wrong.returncode == 2
    piped = subprocess.run(
        [*program, "--target", gateway.target, "step", "--model", "sums", "-"],
        input="1,2\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert piped.stdout.count(",") == 2


@given(
    array=hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2),
        elements=st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False),
    )
)
def test_csv_brings_every_float_back(array, tmp_path_factory):
    path = str(tmp_path_factory.getbasetemp() / "round.csv")
    write_sequence(array, path)
    np.testing.assert_array_equal(read_sequence(path), array)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ("1,2\n3\n", "line 2: expected 2 columns as above, got 1"),
        ("1,2\n3,x\n", "line 2: expected numbers separated by commas, got '3,x'"),
    ],
)
def test_csv_that_is_none_is_named(tmp_path, text, said):
    (tmp_path / "x.csv").write_text(text)
    with pytest.raises(DataError, match=re.escape(said)):
        read_sequence(str(tmp_path / "x.csv"))


@pytest.mark.parametrize("array", [np.zeros(3), np.zeros((1, 2), complex), np.array([["a"]])])
def test_an_array_of_another_kind_is_named(tmp_path, array):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(DataError, match=r"expected numbers \[time, features\]"):
        read_sequence(str(tmp_path / "x.npy"))


def test_pickled_objects_are_not_loaded(tmp_path):
    np.save(tmp_path / "x.npy", np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(DataError, match="pickle"):
        read_sequence(str(tmp_path / "x.npy"))
