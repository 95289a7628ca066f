import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from training import command, train
from training.exporting.publication import Target

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("how", [["training/train.py"], ["-m", "training.train"]])
def test_help_names_every_option_and_needs_no_tensorflow(how):
    code = [sys.executable, "-X", "importtime", *how, "--help"]
    done = subprocess.run(code, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    for option in (
        "--task",
        "--model",
        "--preset",
        "--seed",
        "--log-dir",
        "--export-dir",
        "--no-export",
        "--name",
        "--version",
        "--set",
        "--epochs",
        "--data-parallel",
        "--new-recipe",
        "-v",
    ):
        assert option in done.stdout
    assert "tensorflow" not in done.stderr
    assert "keras" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--seed", "-1"], "seed should be between"),
        (["--batch-size", "0"], "batch_size should be an integer of at least 1"),
        (["--attempts", "0"], "attempts should be"),
        (["--set", "task.bits=0"], "bits should be an integer of at least 1; received 0"),
        (["--task", "ngrams", "--set", "task.length=-5"], "length should be an integer of at least 1; received -5"),
        (["--epochs", "0"], "epochs should be an integer of at least 1"),
        (["--name", "a/b"], "expected a model name"),
        (["--version", "0"], "at least 1; got 0"),
        (["--model", "dense"], "expected --no-export"),
    ],
)
def test_a_bad_option_is_refused_before_anything_is_written(arguments, text, tmp_path, capsys):
    assert train.main([*arguments, "--log-dir", str(tmp_path)]) == 2
    assert text in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_log_directory_comes_from_the_option_then_the_environment_then_the_default(monkeypatch, tmp_path):
    def run_dir(*arguments):
        return train._run_dir(train.parser().parse_args(arguments))

    monkeypatch.delenv("NTM_LOG_DIR", raising=False)
    monkeypatch.delenv("LOGDIR_BASE", raising=False)
    assert run_dir() == Path("runs/copy-ntm-quick-0")
    monkeypatch.setenv("LOGDIR_BASE", "elsewhere")
    assert run_dir() == Path("elsewhere/copy-ntm-quick-0")
    monkeypatch.setenv("NTM_LOG_DIR", str(tmp_path))
    assert run_dir("--seed", "4") == tmp_path / "copy-ntm-quick-4"
    assert run_dir("--log-dir", "x", "--model", "lstm") == Path("x/copy-lstm-quick-0")
    assert run_dir("--run-dir", "y") == Path("y")


def test_a_trained_network_is_exported_and_the_result_told(tiny, tmp_path, capsys):
    config = dataclasses.replace(tiny, recipe=dataclasses.replace(tiny.recipe, attempts=1))
    target = Target(tmp_path / "models", "tiny")
    status = command.run_training(config, tmp_path / "run", target=target, verbose=True)
    assert status == 1, "a few updates do not solve it, and the exit status says so"
    assert (tmp_path / "models" / "tiny" / "1" / "saved_model.pb").is_file()
    told = capsys.readouterr().out
    assert "NOT solved" in told
    assert told.count("  accuracy: 5: ") == 4, "after every epoch"
    assert re.search(r"accuracy over 64 sequences each: 5: \d+\.\d\d %, 10: .* 20: .* 40: .* 80: ", told)
    assert "exported: " in told


def test_a_run_that_was_told_when_to_stop_says_how_to_go_on(tiny, tmp_path, capsys):
    for epochs, stopped in ((3, True), (9, False)):  # It is over after eight.
        assert command.run_training(tiny, tmp_path / "run", target=None, epochs=epochs) == 1
        told = f"stopped after {epochs} epochs; the same command with a higher -e goes on"
        assert (told in capsys.readouterr().out) is stopped


def test_with_only_solved_what_is_not_solved_is_not_exported(tiny, tmp_path):
    config = dataclasses.replace(tiny, recipe=dataclasses.replace(tiny.recipe, attempts=1))
    target = Target(tmp_path / "models", "tiny")
    assert command.run_training(config, tmp_path / "run", target=target, only_solved=True) == 1
    assert not (tmp_path / "models").exists()


def test_another_run_in_the_directory_is_told(tiny, tmp_path, capsys):
    (tmp_path / "checkpoint.npz").write_bytes(b"")
    dataclasses.replace(tiny, seed=11).save(tmp_path)
    assert command.run_training(tiny, tmp_path, target=None) == 2
    assert "another configuration" in capsys.readouterr().out
