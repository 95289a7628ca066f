"""TensorFlow reads once, while it is imported, whether it uses oneDNN's operations: who is too late is told."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTING = "TF_ENABLE_ONEDNN_OPTS"
# Whoever looks for TensorFlow only sees that it was imported: an empty module is as good, and there at once.
TENSORFLOW = "import sys, types; sys.modules['tensorflow'] = types.ModuleType('tensorflow')\n"
TELL = f"import os; print(os.environ[{SETTING!r}])"


def run(script, **settings):
    environment = {name: value for name, value in os.environ.items() if name != SETTING}
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment | settings,
        capture_output=True,
        text=True,
        check=True,
    )


def test_training_turns_it_off_where_it_comes_first():
    ended = run(f"import training; {TELL}")
    assert (ended.stdout, ended.stderr) == ("0\n", "")


def test_training_warns_where_tensorflow_came_first():
    ended = run(f"{TENSORFLOW}import training; {TELL}")
    assert ended.stdout == "0\n"  # of what it starts from here on
    assert "<string>:2: RuntimeWarning: TensorFlow was imported with oneDNN's operations" in ended.stderr
    assert f"{SETTING}=0" in ended.stderr


@pytest.mark.parametrize("value", ["0", "1"])
def test_what_the_environment_says_is_left_alone(value):
    ended = run(f"{TENSORFLOW}import training; {TELL}", **{SETTING: value})
    assert (ended.stdout, ended.stderr) == (f"{value}\n", "")
