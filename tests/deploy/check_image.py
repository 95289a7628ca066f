"""``python tests/deploy/check_image.py [TARGET...]``: runs what scripts/build_images.sh built out of the images' files.

In a chroot of its own on an image's files, mounted read-only, as the image's user, with nothing of this machine but
/dev, /proc, the network and the folders that stand for volumes. Gateways and the model server step sessions, the
trainer trains for a moment and exports. Prints what the files take and what is resident, and fails where a limit is
passed. As root, with buildah.
"""

import contextlib
import json
import os
import shlex
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
from tests.deploy.rendered import find, pod_spec, render
from tests.integration.processes import Gateway
from tests.service.executors.sequence_models import WIDTH, export_sums
from tests.service.gateway_process import resident_bytes
from tests.service.model_server.processes import running_model_server, wait_until
from tests.service.sessions.valkey import free_port

_ENTER = """
mount --bind {root} {root}
{volumes}
mount -o remount,ro,bind {root}
mount --rbind /dev {root}/dev && mount -t proc proc {root}/proc && mount -t tmpfs tmpfs {root}/tmp
cd / && exec chroot --userspec={user} {root} /usr/bin/env -i {environment} {command}
"""
_START_LIMIT_S = 90


def buildah(*arguments):
    return subprocess.run(["buildah", *arguments], check=True, capture_output=True, text=True).stdout.strip()


class Image:
    """One image, and what runs out of its files."""

    def __init__(self, name):
        tag = f"localhost/ntm-serving/{name}:0.1.0"
        self.config = json.loads(buildah("inspect", "--type", "image", tag))["Docker"]["config"]
        self._container = buildah("from", tag)
        self.root = Path(buildah("mount", self._container))
        self.uid = int(self.config["User"].split(":")[0])

    def close(self):
        buildah("rm", self._container)

    def start(self, command, environment=None, volumes=None, **options):
        """A process; ``volumes`` are folders by the path that they get."""
        given = dict(entry.split("=", 1) for entry in self.config["Env"]) | (environment or {})
        for path, folder in (volumes or {}).items():
            (self.root / path.lstrip("/")).mkdir(parents=True, exist_ok=True)
            os.chown(folder, self.uid, self.uid)
        words = _ENTER.format(
            root=self.root,
            volumes="\n".join(f"mount --bind {folder} {self.root}{path}" for path, folder in (volumes or {}).items()),
            user=self.config["User"],
            environment=shlex.join(f"{key}={value}" for key, value in given.items()),
            command=shlex.join(map(str, command)),
        )
        return subprocess.Popen(["unshare", "--mount", "sh", "-ec", words], **options)

    def run(self, *command, **options):
        """To its end; returns the exit code and what it said."""
        process = self.start(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
        said, _ = process.communicate(timeout=_START_LIMIT_S)
        return process.returncode, said

    def megabytes(self):
        """Of all files, each once however many names it has."""
        statuses = [path.lstat() for path in self.root.rglob("*")]
        return sum({status.st_ino: status.st_size for status in statuses}.values()) / 1e6

    @contextlib.contextmanager
    def serving(self, health, *arguments, **options):
        """Its entry point, until it is SERVING as its own health check finds; yields the process and the seconds."""
        began = time.monotonic()
        process = self.start([*self.config["Entrypoint"], *arguments], **options)
        check = ["chroot", self.root, "/opt/ntm/bin/python", "-m", "service.health", f"127.0.0.1:{health}"]

        def healthy():
            return subprocess.run(check, capture_output=True, check=False).returncode == 0

        try:
            wait_until(lambda: process.poll() is not None or healthy(), _START_LIMIT_S)
            assert process.poll() is None
            yield process, time.monotonic() - began
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()


def closed(image):
    """Nobody's process, that can write to /tmp alone, with no installer."""
    code, said = image.run("sh", "-c", "id -u; touch /tmp/x; touch /x /opt/ntm/x /var/x; which pip pip3 gcc; true")
    assert code == 0
    assert said.count("Read-only file system") == 3, said
    assert said.splitlines()[0] == str(image.uid)
    assert "/bin/" not in said, said
    labels = image.config["Labels"]
    assert labels["org.opencontainers.image.title"].startswith("ntm-serving")
    assert len(labels["org.opencontainers.image.revision"]) == 40


def gateway(image, folder):
    """Over an ntm-model-server of this environment; returns MB resident."""
    with running_model_server(folder / "models", folder / "server") as server:
        return stepped(image, f"--tf-serving={server.address}", "--model=sums")


def gateway_embedded(image, folder):
    """With the models in a volume."""
    return stepped(image, "--model-dir=/models", volumes={"/models": folder / "models"})


def stepped(image, *arguments, **options):
    port, health = free_port(), free_port()
    environment = {"NTM_HEALTH_LISTEN": f"127.0.0.1:{health}", "NTM_LISTEN": f"127.0.0.1:{port}"}
    with image.serving(health, *arguments, environment=environment, **options) as (process, start):
        step_sessions(f"127.0.0.1:{port}")
        return told(image, process, start)


def model_server(image, folder):
    """With the image's own arguments but for the port, behind an ntm-serve of this environment."""
    port = free_port()
    arguments = [word.replace(":8500", f":{port}") for word in image.config["Cmd"]]
    with (
        image.serving(port, *arguments, volumes={"/models": folder / "models"}) as (process, start),
        Gateway(folder, "--tf-serving", f"127.0.0.1:{port}", "--model", "sums") as ours,
    ):
        step_sessions(ours.target)
        return told(image, process, start)


def step_sessions(target):
    inputs = np.arange(4 * WIDTH, dtype=np.float32).reshape(4, WIDTH)
    with SequenceClient(target) as client:
        sessions = [client.create_session("sums") for _ in range(64)]
        for outputs in client.step_many([(session, inputs) for session in sessions]):
            np.testing.assert_allclose(outputs, 3 * np.cumsum(inputs, axis=0))


def told(image, process, start):
    resident = resident_bytes(process.pid) / 1e6
    assert Path(f"/proc/{process.pid}").stat().st_uid == image.uid
    print(f"  SERVING after {start:.2f} s, 64 sessions stepped, resident {resident:.0f} MB")
    return resident


def trainer(image, folder):
    """The training Job's arguments, with one epoch, and published though nothing was learned in it; then served."""
    words = pod_spec(find(render("training"), "Job", "train-copy"))["containers"][0]["args"]
    words = [word for word in words if word != "--only-solved"] + ["--epochs=1"]
    volumes = {f"/{name}": folder / "trained" / name for name in ("models", "runs")}
    for path in volumes.values():
        path.mkdir(parents=True)
    began = time.monotonic()
    code, said = image.run(*image.config["Entrypoint"], *words, volumes=volumes)
    assert "NOT solved" in said, said
    assert code == 1
    version = volumes["/models"] / "copy" / "1"
    assert (version / "saved_model.pb").stat().st_uid == image.uid
    print(f"  trained for an epoch and exported in {time.monotonic() - began:.0f} s")
    with Gateway(folder, "--model-dir", str(volumes["/models"])) as ours, SequenceClient(ours.target) as client:
        (model,) = client.models()
        width = model.versions[0].input_dim
        with client.session("copy") as session:
            assert session.step(np.zeros((4, width), np.float32)).shape == (4, model.versions[0].output_dim)
    print(f"  its export was served and stepped, fingerprint {model.versions[0].fingerprint[:12]}")
    code, said = image.run("sh", "-c", "ls -d /opt/ntm/lib/python3.11/site-packages/nvidia/*/lib || true")
    print(f"  folders of CUDA libraries: {said.count('/lib') // 2 if 'No such' not in said else 0}")


CHECKS = {"gateway": gateway, "gateway-embedded": gateway_embedded, "model-server": model_server, "trainer": trainer}


def main(targets):
    for target in targets:
        image = Image(target)
        try:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                folder.chmod(0o755)
                size = image.megabytes()
                print(f"{target}: user {image.config['User']}, {size:,.0f} MB of files")
                closed(image)
                export_sums(folder / "models", scale=3.0)
                resident = CHECKS[target](image, folder)
        finally:
            image.close()
        if target == "gateway":
            assert size < IMAGE_MB
            assert resident < RESIDENT_MB


if __name__ == "__main__":
    main(sys.argv[1:] or ["gateway"])
