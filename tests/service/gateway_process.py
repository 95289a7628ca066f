"""A gateway around the test model as a process: ``python -m tests.service.gateway_process PORT_FILE STORE``."""

import asyncio
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from service.backends import make_store
from service.config import Settings
from service.polling import IN_PLACE, SETTING
from service.server import serve_with
from tests.service.support import NumpyExecutor


@contextmanager
def gateway_process(port_file: Path, store: str = "memory") -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The process and its port; ended by SIGTERM, which has to give exit code 0."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.service.gateway_process", str(port_file), store],
        env={SETTING: IN_PLACE, **os.environ},  # as ntm-serve has it
    )
    try:
        while not port_file.exists():
            assert process.poll() is None, "the gateway ended at start"
            time.sleep(0.01)
        yield process, int(port_file.read_text())
    finally:
        process.terminate()
        code = process.wait(120)
    assert code == 0


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


if __name__ == "__main__":
    settings = Settings(
        model_dir=Path(), listen="127.0.0.1:0", port_file=Path(sys.argv[1]), store=sys.argv[2], max_chunk_mib=1
    )

    executor = NumpyExecutor()
    executor.batches = deque(maxlen=1)  # kept ones would be taken for a leak of the gateway's

    async def run() -> int:
        return await serve_with(settings, executor=executor, store=make_store(settings))

    sys.exit(asyncio.run(run()))
