"""A real Prometheus on a port of its own."""

import asyncio
import json
import math
import re
import shutil
import subprocess
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

DEPLOY = Path(__file__).parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"

needs_prometheus = pytest.mark.skipif(
    not (shutil.which("prometheus") and shutil.which("promtool")),
    reason="needs the programs prometheus and promtool (Debian and Ubuntu: apt-get install prometheus)",
)

_CONFIG = """
global:
  scrape_interval: 250ms
  evaluation_interval: 250ms
rule_files:
  - {rules}
scrape_configs:
  - job_name: ntm-gateway
    static_configs:
      - targets: {targets}
"""


class Prometheus:
    """Answers queries."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    async def query(self, expression: str) -> Sequence[tuple[Mapping[str, str], float]]:
        """What an instant query gives now: labels and values that are numbers."""
        data = await self._get("query?" + urllib.parse.urlencode({"query": expression}))
        found = [(result["metric"], float(result["value"][1])) for result in data["result"]]
        return [(labels, value) for labels, value in found if not math.isnan(value)]

    async def rules(self) -> Sequence[Mapping[str, Any]]:
        """The rules that it evaluates."""
        return [rule for group in (await self._get("rules"))["groups"] for rule in group["rules"]]

    async def _get(self, path: str) -> Any:
        def get() -> Any:
            with urllib.request.urlopen(self._url + path, timeout=20) as answer:
                return json.load(answer)["data"]

        return await asyncio.to_thread(get)


@contextmanager
def running_prometheus(ports: Sequence[int]) -> Iterator[Prometheus]:
    """Scrapes gateways four times a second, with the alerts that are shipped."""
    with tempfile.TemporaryDirectory(prefix="prometheus-") as name:
        folder = Path(name)
        config, log = folder / "prometheus.yml", folder / "log"
        targets = json.dumps([f"127.0.0.1:{port}" for port in ports])
        config.write_text(_CONFIG.format(rules=json.dumps(str(ALERTS)), targets=targets))
        command = ["prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*command, "--web.listen-address=127.0.0.1:0"], stdout=output, stderr=subprocess.STDOUT
            )
        try:
            yield Prometheus(_port(process, log))
        finally:
            process.terminate()
            process.wait(30)


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    while True:
        found = re.search(r'msg="Listening on" address=127\.0\.0\.1:(\d+)', log.read_text())
        ready = "Server is ready to receive web requests" in log.read_text()
        if found and ready:
            return int(found[1])
        assert process.poll() is None, log.read_text()
        time.sleep(0.02)
