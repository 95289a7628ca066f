import json
import subprocess
import sys
from pathlib import Path

import pytest

from service.config import Settings, SettingsError, read_settings
from service.server import main


@pytest.fixture
def models(tmp_path):
    folder = tmp_path / "models"
    folder.mkdir()
    return str(folder)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(models, tmp_path, monkeypatch):
    file = tmp_path / "gateway.toml"
    file.write_text(f'model_dir = "{models}"\nmax_sessions = 1\nmax_batch_size = 2\nmax_queued_steps = 3\n')
    monkeypatch.setenv("NTM_CONFIG", str(file))
    monkeypatch.setenv("NTM_MAX_BATCH_SIZE", "20")
    monkeypatch.setenv("NTM_MAX_QUEUED_STEPS", "30")
    settings = read_settings(["--max-queued-steps", "300"])
    assert (settings.model_dir, settings.max_sessions) == (Path(models), 1)
    assert (settings.max_batch_size, settings.max_queued_steps) == (20, 300)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "one of --model-dir and --tf-serving"),
        (["--model-dir", "MODELS", "--tf-serving", "a:1", "--model", "m"], "one of --model-dir and --tf-serving"),
        (["--tf-serving", "127.0.0.1:8500"], "--model"),
        (["--model-dir", "nowhere"], "--model-dir: expected a directory"),
        (["--model-dir", "MODELS", "--listen", "50051"], "--listen: expected HOST:PORT"),
        (["--model-dir", "MODELS", "--listen", "127.0.0.1:65536"], "--listen: expected HOST:PORT"),
        (["--model-dir", "MODELS", "--listen", "0.0.0.0:50051"], "--insecure"),
        (["--model-dir", "MODELS", "--tls-key", "nowhere"], "--tls-key: expected a file"),
        (["--model-dir", "MODELS", "--max-batch-size", "0"], "--max-batch-size: "),
        (["--model-dir", "MODELS", "--max-batch-size", "many"], "--max-batch-size: "),
        (["--model-dir", "MODELS", "--session-ttl", "99", "--max-session-ttl", "9"], "--session-ttl"),
        (["--model-dir", "MODELS", "--store", "mysql://x"], "--store: expected"),
    ],
)
def test_what_is_wrong_is_named(arguments, says, models):
    with pytest.raises(SettingsError) as caught:
        read_settings([models if argument == "MODELS" else argument for argument in arguments])
    assert says in str(caught.value)


def test_open_to_everybody_needs_saying_or_tls_and_credentials(models, tmp_path):
    for name in ("k", "c", "t"):
        (tmp_path / name).touch()
    everywhere = {"model_dir": models, "listen": "0.0.0.0:0"}
    tls = {"tls_key": tmp_path / "k", "tls_cert": tmp_path / "c"}
    assert Settings(**everywhere, insecure=True)
    assert Settings(**everywhere, **tls, token_file=tmp_path / "t")
    assert Settings(**everywhere, **tls, tls_client_ca=tmp_path / "c")
    for guard in ({}, tls, {"token_file": tmp_path / "t"}):
        with pytest.raises(ValueError, match="open to everybody"):
            Settings(**everywhere, **guard)


def test_a_certificate_for_the_model_server_comes_with_its_key_and_with_whom_it_is_shown_to(tmp_path):
    given = {"tf_serving": "models:8500", "model": ["sums"]}
    files = {f"tf_serving_{name}": tmp_path / name for name in ("ca", "key", "cert")}
    for file in files.values():
        file.touch()
    assert Settings(**given, **files)
    for missing in ("tf_serving_key", "tf_serving_cert", "tf_serving_ca"):
        with pytest.raises(ValueError, match=f"--{missing.replace('_', '-')}"):
            Settings(**given, **{name: file for name, file in files.items() if name != missing})


def test_an_option_that_does_not_exist_is_refused(models, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        read_settings(["--model-dir", models, "--max-bach-size", "3"])
    assert "--max-bach-size" in capsys.readouterr().err
    file = tmp_path / "gateway.toml"
    file.write_text("max_bach_size = 3")
    monkeypatch.setenv("NTM_CONFIG", str(file))
    with pytest.raises(SettingsError, match="max-bach-size"):
        read_settings(["--model-dir", models])
    monkeypatch.setenv("NTM_CONFIG", str(tmp_path / "nothing.toml"))
    with pytest.raises(SettingsError, match="NTM_CONFIG"):
        read_settings(["--model-dir", models])


def test_check_prints_what_it_would_run_with_and_no_password(models, capsys):
    assert main(["--model-dir", models, "--store", "redis://user:hunter2@valkey:6379/0", "--check"]) == 0
    printed = capsys.readouterr().out
    assert json.loads(printed)["max_batch_size"] == 256
    assert "valkey:6379" in printed
    assert "hunter2" not in printed


def test_a_wrong_setting_ends_the_command_with_its_name_and_no_traceback(capsys):
    assert main(["--model-dir", "nowhere"]) == 2
    assert (
        capsys.readouterr().err
        == "ntm-serve: --model-dir: expected a directory of models; 'nowhere' is not a directory\n"
    )


def test_the_gateway_s_modules_bring_no_tensorflow():
    code = "import sys, service.server; print([m for m in sys.modules if m.split('.')[0] in ('tensorflow', 'keras')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_option_is_explained(name):
    description = Settings.model_fields[name].description
    assert description
    assert description.endswith(".")


def test_the_file_may_be_named_by_a_flag_which_wins_over_the_environment(models, tmp_path, monkeypatch):
    one, other = tmp_path / "one.toml", tmp_path / "other.toml"
    one.write_text(f'model_dir = "{models}"\nmax_sessions = 1\n')
    other.write_text(f'model_dir = "{models}"\nmax_sessions = 2\n')
    monkeypatch.setenv("NTM_CONFIG", str(other))
    assert read_settings([]).max_sessions == 2
    assert read_settings(["--config", str(one)]).max_sessions == 1
    assert read_settings([f"--config={one}", "--max-sessions", "3"]).max_sessions == 3


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_sessions = ", "--config: .* is not TOML"),
        ("max_sessions = 0", "--max-sessions: "),
        ("max_sesions = 5", "--max-sesions: "),
    ],
)
def test_what_is_wrong_in_the_file_is_named(models, tmp_path, text, says):
    file = tmp_path / "gateway.toml"
    file.write_text(text)
    with pytest.raises(SettingsError, match=says):
        read_settings(["--config", str(file), "--model-dir", models])
    with pytest.raises(SettingsError, match=r"--config or NTM_CONFIG: .* is not a file"):
        read_settings(["--config", str(tmp_path / "nowhere"), "--model-dir", models])
