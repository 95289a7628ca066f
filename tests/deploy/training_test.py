"""The training Job as it ships, run as a process beside the pods of the dev overlay that serve what it publishes.

The manifest's command, arguments and volumes; added is ``--epochs``, for no network learns its task in the time of a
test, and one that did not is published only where an operator takes ``--only-solved`` out.
"""

import copy

import numpy as np
import pytest

from service.client import SequenceClient
from tests.deploy import rendered
from tests.deploy.deployment_test import secrets
from tests.deploy.pods import Cluster
from tests.deploy.rendered import find, pod_spec
from tests.service.model_server.processes import wait_until

pytestmark = rendered.needs_kubectl

MODEL, INPUT_DIM, CHUNKS = "copy", 10, 3


def edited(*, seed=0, publish_anything=False):
    """What an operator may write into the Job before it is applied (docs/rollout.md)."""
    job = copy.deepcopy(find(rendered.render("training"), "Job", "train-copy"))
    trainer = pod_spec(job)["containers"][0]
    words = [word.replace("copy-0", f"copy-{seed}").replace("--seed=0", f"--seed={seed}") for word in trainer["args"]]
    trainer["args"] = [word for word in words if not (publish_anything and word == "--only-solved")] + ["--epochs=1"]
    return job


@pytest.fixture
def cluster(tmp_path):
    made = secrets(tmp_path / "secrets")
    replicas = {"valkey": 1, "model-server": 1, "gateway": 1}
    cluster = Cluster(rendered.overlay("dev"), tmp_path, secrets=made, replicas=replicas, first=70)
    try:
        yield cluster
    finally:
        cluster.stop()


def versions(cluster):
    folder = cluster.claim("models") / MODEL
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def publish(cluster, **options):
    code, said = cluster.run(edited(publish_anything=True, **options))
    assert code == 1, said
    assert "NOT solved" in said, "the exit code of a network that did not learn its task"
    assert "exported: " in said


def test_what_the_job_publishes_is_served_beside_what_was_there(cluster):
    code, said = cluster.run(edited())
    assert code == 1, said
    assert "exported" not in said
    assert versions(cluster) == [], "a network that did not learn the task is not published"
    publish(cluster)  # goes on from the checkpoint of the run before
    assert versions(cluster) == ["1"]

    for name in ("valkey", "model-server", "gateway"):
        cluster.start(name).wait_ready()
    inputs = np.random.default_rng(0).integers(0, 2, (CHUNKS, 4, INPUT_DIM)).astype(np.float32)
    with SequenceClient(cluster.target("gateway", 50051)) as client:
        kept = client.create_session(MODEL)
        came = [kept.step(inputs[0])]

        publish(cluster, seed=1)
        assert versions(cluster) == ["1", "2"]
        wait_until(lambda: newest(client) == 2, 60)

        came += [kept.step(chunk) for chunk in inputs[1:]]
        assert kept.info().version == 1
        on_one, on_two = (whole(client, version, inputs) for version in (1, 2))
        np.testing.assert_allclose(np.concatenate(came), on_one, rtol=1e-4, atol=1e-5)
        assert np.abs(on_two - on_one).max() > 1e-3, "another seed gives another network"
        with client.session(MODEL) as young:
            np.testing.assert_allclose(young.step(inputs[0]), on_two[: len(inputs[0])], rtol=1e-4, atol=1e-5)
        kept.close()


def newest(client):
    """The version that a session gets now."""
    with client.session(MODEL) as session:
        return session.info().version


def whole(client, version, inputs):
    """The outputs of a session opened on a version, for all of the chunks as one."""
    with client.session(MODEL, version=version) as session:
        return session.step(inputs.reshape(-1, INPUT_DIM))
