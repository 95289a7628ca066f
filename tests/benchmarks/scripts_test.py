"""The benchmarks that stand on the gateway's insides still fit them: each is run once, as briefly as it goes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("gateway_cpu.py --rounds 1 --messages 2 --sessions 8", r"8 steps of 1 in a message: ([\d.]+) us of CPU"),
        ("gateway_cpu.py --rounds 1 --messages 2 --steps 3 --streams 2 --requests", r"of 3 in a message: ([\d.]+) us"),
        ("client_cost.py --seconds 0.01", r"asyncio gather +256 +16 +([\d.]+) "),
        ("client_cost.py --seconds 0.01 --requests", r"asyncio step_many +256 +16 +([\d.]+) "),
        ("metrics_overhead.py --rounds 1 --seconds 0.02 --executors idle", r"idle +([\d.]+) us of CPU a step"),
    ],
)
def test_it_runs_and_tells_its_figure(command, told):
    script, *arguments = command.split()
    ended = subprocess.run(
        [sys.executable, f"benchmarks/{script}", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout
    assert float(re.search(told, ended.stdout).group(1)) > 0, ended.stdout
