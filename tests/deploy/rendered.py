"""What ``kubectl kustomize`` makes of deploy/kubernetes: the objects that a cluster would be given."""

import functools
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
KUBERNETES = REPOSITORY / "deploy" / "kubernetes"
OVERLAYS = ("dev", "gpu", "production")
JOBS = ("training", "rollback")
WORKLOADS = ("Deployment", "StatefulSet", "Job")

needs_kubectl = pytest.mark.skipif(
    shutil.which("kubectl") is None, reason="kubectl is not installed; it renders deploy/kubernetes (kubectl kustomize)"
)


@functools.cache
def render(folder):
    """The objects of a folder of deploy/kubernetes."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def overlay(name):
    return render(f"overlays/{name}")


def of_kind(objects, *kinds):
    return [thing for thing in objects if thing["kind"] in kinds]


def find(objects, kind, name):
    (found,) = [thing for thing in of_kind(objects, kind) if thing["metadata"]["name"] == name]
    return found


def pod_spec(workload):
    return workload["spec"]["template"]["spec"]


def containers(workload):
    """All of them, those that run first included."""
    spec = pod_spec(workload)
    return [*spec.get("initContainers", []), *spec["containers"]]


def everything():
    """Each workload of each overlay, and the Jobs."""
    folders = [*(f"overlays/{name}" for name in OVERLAYS), *JOBS]
    return [(folder, workload) for folder in folders for workload in of_kind(render(folder), *WORKLOADS)]


def with_component(tmp_path, base, *components):
    """An overlay that adds components to another one, as a user of theirs would write it."""
    folder = tmp_path / "overlay"
    folder.mkdir()
    text = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [relative(folder, KUBERNETES / "overlays" / base)],
        "components": [relative(folder, KUBERNETES / "components" / name) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(text))
    return render(folder)


def relative(start, path):
    """Kustomize takes no absolute paths."""
    return os.path.relpath(path.resolve(), start.resolve())
