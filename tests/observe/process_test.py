"""``ntm-serve`` as an operator starts it."""

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.observe.scrape import Scrape


def told(process, log, pattern):
    while (found := re.search(pattern, log.read_text())) is None:
        assert process.poll() is None, log.read_text()
        time.sleep(0.01)
    return found[1]


def test_a_gateway_that_waits_for_its_model_server_is_watched_already_and_ends_when_told(tmp_path):
    """By the environment, as manifests have it; and no collector takes the traces, which must not hold it up."""
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "NTM_LISTEN": "127.0.0.1:0",
        "NTM_METRICS_LISTEN": "127.0.0.1:0",
        "NTM_TRACING": "true",
        "NTM_TF_SERVING": "127.0.0.1:1",
        "NTM_MODEL": '["copy"]',
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1",
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ntm-serve"))], env=environment, stdout=output, stderr=output
        )
    try:
        with urllib.request.urlopen(told(process, log, r"metrics on (\S+)"), timeout=20) as answer:
            now = Scrape(answer.read().decode())
        assert now.value("ntm_serving") == 0
        assert now.value("process_resident_memory_bytes") > 0
        assert now.value("ntm_build_info") == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in log.read_text()
