"""``python tests/deploy/check_image.py``: starts the gateway out of the image that scripts/build_images.sh built.

In a chroot of its own on the image's files, mounted read-only, as the image's user, with nothing of this machine but
/dev, /proc and the network. It serves models of an ntm-model-server that runs outside. Prints what the image's files
take, what is resident, and fails where a limit is passed. As root, with buildah.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from service.client import SequenceClient
from tests.deploy.image_test import IMAGE_MB, RESIDENT_MB
from tests.service.executors.sequence_models import WIDTH, export_sums
from tests.service.gateway_process import resident_bytes
from tests.service.model_server.processes import running_model_server, wait_until
from tests.service.sessions.valkey import free_port

IMAGE = "localhost/ntm-serving/gateway:0.1.0"
_ENTER = """
mount --bind {root} {root} && mount -o remount,ro,bind {root}
mount --rbind /dev {root}/dev && mount -t proc proc {root}/proc && mount -t tmpfs tmpfs {root}/tmp
cd / && exec chroot --userspec={user} {root} /usr/bin/env -i {environment} {command}
"""


def buildah(*arguments):
    return subprocess.run(["buildah", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def main():
    config = json.loads(buildah("inspect", "--type", "image", IMAGE))["Docker"]["config"]
    container = buildah("from", IMAGE)
    root = Path(buildah("mount", container))
    try:
        size = measure(root)
        with tempfile.TemporaryDirectory() as folder:
            start, rss = serve(root, config, Path(folder))
    finally:
        buildah("rm", container)
    print(f"files of the image: {size:.0f} MB (at most {IMAGE_MB})")
    print(f"user {config['User']}, SERVING after {start:.2f} s, resident {rss:.0f} MB (at most {RESIDENT_MB})")
    assert size < IMAGE_MB
    assert rss < RESIDENT_MB


def measure(root):
    """MB of all files, each once however many names it has."""
    found = {}
    for path in root.rglob("*"):
        status = path.lstat()
        found[status.st_ino] = status.st_size
    return sum(found.values()) / 1e6


def serve(root, config, folder):
    """Seconds to SERVING, and MB resident after 64 sessions were stepped."""
    export_sums(folder / "models", scale=3.0)
    port, health = free_port(), free_port()
    with running_model_server(folder / "models", folder / "server") as server:
        given = {"NTM_HEALTH_LISTEN": f"127.0.0.1:{health}", "NTM_LISTEN": f"127.0.0.1:{port}"}
        environment = dict(entry.split("=", 1) for entry in config["Env"]) | given
        command = [*config["Entrypoint"], f"--tf-serving={server.address}", "--model=sums"]
        words = _ENTER.format(
            root=root,
            user=config["User"],
            environment=" ".join(f"{key}={value}" for key, value in environment.items()),
            command=" ".join(command),
        )
        began = time.monotonic()
        process = subprocess.Popen(["unshare", "--mount", "sh", "-ec", words])
        try:
            wait_until(lambda: healthy(root, health) or process.poll() is not None, 60)
            assert process.poll() is None
            start = time.monotonic() - began
            inputs = np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
            with SequenceClient(f"127.0.0.1:{port}") as client:
                sessions = [client.create_session("sums") for _ in range(64)]
                for outputs in client.step_many([(session, inputs) for session in sessions]):
                    np.testing.assert_allclose(outputs, 3 * np.cumsum(inputs, axis=0))
            rss = resident_bytes(process.pid) / 1e6
            assert Path(f"/proc/{process.pid}").stat().st_uid == int(config["User"].split(":")[0])
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    return start, rss


def healthy(root, port):
    """As the image's health check asks, and with the image's own files."""
    check = ["chroot", str(root), "/opt/ntm/bin/python", "-m", "service.health", f"127.0.0.1:{port}"]
    return subprocess.run(check, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()
