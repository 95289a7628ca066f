"""The documented commands make the Secrets that the manifests refer to."""

import re
import subprocess

import pytest
import yaml

from tests.deploy import rendered
from tests.deploy.rendered import REPOSITORY, WORKLOADS, containers, of_kind, pod_spec

pytestmark = rendered.needs_kubectl

DOCUMENT = (REPOSITORY / "docs" / "deployment.md").read_text()


def referred_to(objects):
    """``(secret, key)`` of every reference; key is None for a whole Secret that is mounted."""
    for workload in of_kind(objects, *WORKLOADS):
        for container in containers(workload):
            for variable in container.get("env", []):
                if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                    yield reference["name"], reference["key"]
        for volume in pod_spec(workload)["volumes"]:
            if "secret" in volume:
                keys = [item["key"] for item in volume["secret"].get("items", [])] or [None]
                yield from ((volume["secret"]["secretName"], key) for key in keys)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the commands of docs/deployment.md make, without a cluster."""
    folder = tmp_path_factory.mktemp("secrets")
    subprocess.run([REPOSITORY / "deploy" / "secrets.sh", folder / "secrets"], check=True)
    commands = re.findall(r"^kubectl create secret .*$", DOCUMENT, re.MULTILINE)
    assert len(commands) == 3
    made = {}
    for command in commands:
        words = [*command.split(), "--dry-run=client", "--output=yaml"]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
        secret = yaml.safe_load(done.stdout)
        assert secret["metadata"]["namespace"] == "ntm-serving"
        made[secret["metadata"]["name"]] = set(secret["data"])
    return made


@pytest.mark.parametrize("name", ["dev", "gpu"])
def test_the_commands_make_what_is_referred_to(made, name):
    wanted = list(referred_to(rendered.overlay(name)))
    assert {secret for secret, _ in wanted} == set(made)
    assert all(key is None or key in made[secret] for secret, key in wanted)


def test_the_table_for_production_has_every_secret_and_key():
    table = {
        secret: set(re.findall(r"`([\w.]+)`", keys))
        for secret, keys in re.findall(r"^\| `(gateway-\w+)` \| (`[\w.]+`[^|]*) \|", DOCUMENT, re.MULTILINE)
    }
    wanted = list(referred_to(rendered.overlay("production")))
    assert {secret for secret, _ in wanted} == set(table)
    assert all(key is None or key in table[secret] for secret, key in wanted)


def test_secrets_are_for_their_owner_and_never_overwritten(tmp_path):
    script = REPOSITORY / "deploy" / "secrets.sh"
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        subprocess.run([script, folder], check=True)
        assert folder.stat().st_mode & 0o077 == 0
    for name in ("store-url", "snapshots", "users.acl"):
        assert (folders[0] / name).read_bytes() != (folders[1] / name).read_bytes()
    before = (folders[0] / "store-url").read_text()
    again = subprocess.run([script, folders[0]], capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "has secrets already" in again.stderr
    assert (folders[0] / "store-url").read_text() == before
    assert before.split(":")[2].split("@")[0] not in (folders[0] / "users.acl").read_text()
