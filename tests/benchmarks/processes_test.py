"""What the benchmarks read of the system."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import processes


def test_stolen_is_a_share_of_what_has_passed_since():
    share, (stolen, passed) = processes.stolen()
    assert share == 0
    assert 0 <= stolen < passed
    assert processes.stolen((0, 0))[0] >= stolen / passed / 2  # since the machine was started
    assert processes.stolen((stolen - 10, passed - 40))[0] > 0
    assert 0 <= processes.stolen((stolen, passed))[0] <= 1
