"""The dev overlay as it ships, run as processes: a version rolled out and back, then pods replaced, all under load.

The tests go in order, over one cluster: two model servers, two gateways at most at once, a Valkey.
"""

import concurrent.futures
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import redis

from service.client import SequenceClient
from tests.deploy import rendered
from tests.deploy.pods import Cluster
from tests.deploy.rendered import REPOSITORY, find
from tests.deploy.traffic import MODEL, Stepped, Traffic
from tests.service.executors.sequence_models import export_sums

pytestmark = rendered.needs_kubectl

# What versions 1, 2 and 3 multiply with; 3 is 1 again, after a roll-back.
SCALES = {1: 1.0, 2: 2.0, 3: 1.0}


def secrets(folder):
    """What deploy/secrets.sh makes, under the names of docs/deployment.md."""
    subprocess.run([REPOSITORY / "deploy" / "secrets.sh", folder], check=True)
    return {
        "gateway-store": {"url": (folder / "store-url").read_text()},
        "gateway-snapshots": {"secret": (folder / "snapshots").read_bytes()},
        "valkey-acl": {"users.acl": (folder / "users.acl").read_text()},
    }


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dev")
    replicas = {"valkey": 1, "model-server": 2, "gateway": 3}
    cluster = Cluster(rendered.overlay("dev"), folder, secrets=secrets(folder / "secrets"), replicas=replicas, first=1)
    export_sums(cluster.claim("models"), MODEL, 1, scale=SCALES[1])
    try:
        started = [cluster.start(name) for name in ("valkey", "model-server", "model-server", "gateway", "gateway")]
        for pod in started:
            pod.wait_ready()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture
def target(cluster):
    return cluster.target("gateway", 50051)


def command_line(cluster, *words):
    """``ntm-client``, as an operator asks one of the gateways."""
    client = [str(Path(sys.executable).with_name("ntm-client")), "--target", f"{cluster.addresses('gateway')[0]}:50051"]
    done = subprocess.run([*client, "--json", *words], capture_output=True, text=True, timeout=60, check=True)
    return json.loads(done.stdout)


# Gateways look for new versions once a second, each at its own time: so many sessions have come by all of them.
_IN_A_ROW = 30


def versions_served(cluster):
    return sorted(row["version"] for row in command_line(cluster, "models") if row["state"].endswith("AVAILABLE"))


def roll_back_job(source, target):
    job = find(rendered.render("rollback"), "Job", "roll-back-copy")
    return job, {"FROM": str(source), "TO": str(target)}


def test_every_port_of_the_manifests_answers(cluster):
    gateway = next(pod for pod in cluster.pods if pod.name == "gateway")
    with urllib.request.urlopen(f"http://{gateway.address}:9464/metrics", timeout=10) as reply:
        assert b"ntm_serving 1.0" in reply.read()
    assert versions_served(cluster) == [1]
    with SequenceClient(f"{gateway.address}:50051") as client, client.session(MODEL) as session:
        assert session.info().version == 1


def test_the_store_takes_nobody_but_the_gateways_and_lets_them_do_no_more_than_they_need(cluster):
    url = cluster.resolved(cluster.secrets["gateway-store"]["url"])
    with redis.Redis.from_url(url.replace("gateway:", "gateway:wrong")) as stranger, pytest.raises(redis.RedisError):
        stranger.ping()
    with redis.Redis.from_url(f"redis://{url.split('@')[1]}") as nobody, pytest.raises(redis.RedisError):
        nobody.ping()
    with redis.Redis.from_url(url) as gateway:
        assert gateway.ping()
        for command in (("FLUSHALL",), ("CONFIG", "GET", "*"), ("KEYS", "*"), ("GET", "other")):
            with pytest.raises(redis.RedisError, match="permissions"):
                gateway.execute_command(*command)


def test_a_version_is_rolled_out_and_back_with_no_request_failed(cluster, target):
    """docs/rollout.md, step by step."""
    models = cluster.claim("models")
    with Traffic(target, SCALES) as traffic, SequenceClient(target) as client:
        traffic.wait_steps(1)
        kept = client.create_session(MODEL)
        kept.step([[1.0, 0.0, 0.0]])

        export_sums(models, MODEL, 2, scale=SCALES[2])
        traffic.wait(lambda: set(traffic.opened[-_IN_A_ROW:]) == {2})
        assert versions_served(cluster) == [1, 2]
        traffic.wait_steps(1)  # the sessions of before, on what they were opened with
        traffic.wait_steps(2)
        on_two = Stepped(traffic, client, traffic.random())
        assert on_two.version == 2

        job, variables = roll_back_job(1, 3)
        code, said = cluster.run(job, **variables)
        assert (code, said) == (0, "version 1 is served as 3 now\n")
        traffic.wait(lambda: set(traffic.opened[-_IN_A_ROW:]) == {3})
        traffic.wait_steps(1)
        traffic.wait_steps(3)
        on_two.step()
        on_two.session.close()
        restored = client.restore(kept.snapshot())
        assert restored.step([[0.0, 2.0, 0.0]])[0].tolist() == [1.0, 2.0, 0.0]
        restored.close()
        kept.close()
    assert traffic.failures == []
    assert traffic.retried == []
    assert sorted(set(traffic.opened)) == [1, 2, 3]


def test_the_roll_back_refuses_what_cannot_be_and_leaves_nothing_behind(cluster):
    before = sorted(path.name for path in (cluster.claim("models") / MODEL).iterdir())
    for source, number, says in ((7, 9, "there is no version 7"), (1, 2, "version 2 is not above 3")):
        job, variables = roll_back_job(source, number)
        code, said = cluster.run(job, **variables)
        assert code == 1
        assert says in said
    assert sorted(path.name for path in (cluster.claim("models") / MODEL).iterdir()) == before


def test_pods_are_replaced_under_load_and_no_request_fails(cluster, target):
    """A rolling update of both: the new pod is ready, then the old one gets its hook, SIGTERM and grace period."""
    gateway = next(pod for pod in cluster.pods if pod.name == "gateway")
    server = next(pod for pod in cluster.pods if pod.name == "model-server")
    with Traffic(target, SCALES) as traffic:
        traffic.wait_steps(3)
        cluster.start("gateway").wait_ready()
        with concurrent.futures.ThreadPoolExecutor() as kubelets:
            ended = [kubelets.submit(pod.end) for pod in (gateway, server)]
            (code, left), (server_code, server_left) = (future.result(90) for future in ended)
        traffic.wait_steps(3)
    assert traffic.failures == []
    assert (code, server_code) == (0, 0), (gateway.log, server.log)
    assert left > 0
    assert server_left > 0
    assert not gateway.probe("readinessProbe")
