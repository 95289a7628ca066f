"""Every overlay renders, is what Kubernetes understands, and keeps the rules that matter."""

import json
from pathlib import Path

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.deploy import rendered
from tests.deploy.rendered import KUBERNETES, OVERLAYS, containers, find, of_kind, pod_spec

pytestmark = rendered.needs_kubectl

# `lifecycle.preStop.sleep` wants 1.30; the newest schemas are checked as well.
OLDEST, NEWEST = "1.30", kubernetes_validate.latest_version()
FOLDERS = (*(f"overlays/{name}" for name in OVERLAYS), *rendered.JOBS)
# Custom resources, whose schemas come with the operators that define them: these are written for what is used here.
CUSTOM = json.loads(Path(__file__).with_name("custom_resources.json").read_text())
KINDS_OF_THEIRS = {"ServiceMonitor", "Certificate", "Issuer"}


def check(thing, version):
    """Against the schema of its kind, in which nothing may stand that is not known."""
    if thing["kind"] in KINDS_OF_THEIRS:
        jsonschema.validate(thing, {**CUSTOM, "$ref": f"#/definitions/{thing['kind']}"}, jsonschema.Draft7Validator)
    else:
        kubernetes_validate.validate(thing, version, strict=True)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_rendered_is_valid_to_the_letter(folder, version):
    objects = rendered.render(folder)
    assert objects
    for thing in objects:
        check(thing, version)


def test_the_schemas_would_notice():
    gateway = yaml.safe_load(yaml.safe_dump(find(rendered.overlay("dev"), "Deployment", "gateway")))
    pod_spec(gateway)["containers"][0]["readynessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(gateway, NEWEST, strict=True)


def test_the_examples_are_valid_too():
    """All of them that are objects of a cluster; the other one is a configuration of prometheus-adapter."""
    checked = []
    for path in sorted((KUBERNETES / "examples").glob("*.yaml")):
        for thing in yaml.safe_load_all(path.read_text()):
            if "kind" in thing:
                check(thing, NEWEST)
                checked.append(thing["kind"])
    assert sorted(checked) == ["Certificate", "Issuer"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda monitor: monitor["spec"]["endpoints"][0].update(intervall="15s"),
        lambda monitor: monitor["spec"]["endpoints"][0].update(interval="15 s"),
        lambda monitor: monitor["spec"].pop("selector"),
        lambda monitor: monitor["spec"]["endpoints"][0].update(port=9464),
    ],
)
def test_the_schemas_of_custom_resources_would_notice(spoil):
    monitor = yaml.safe_load(yaml.safe_dump(find(rendered.overlay("gpu"), "ServiceMonitor", "gateway")))
    check(monitor, NEWEST)
    spoil(monitor)
    with pytest.raises(jsonschema.ValidationError):
        check(monitor, NEWEST)


@pytest.mark.parametrize(("base", "component"), [("dev", "queue-depth"), ("gpu", "object-storage")])
def test_components_that_no_overlay_uses_fit_too(tmp_path, base, component):
    objects = rendered.with_component(tmp_path, base, component)
    for thing in objects:
        check(thing, NEWEST)
    if component == "queue-depth":
        scaler = find(objects, "HorizontalPodAutoscaler", "model-server")["spec"]
        name = scaler["metrics"][0]["external"]["metric"]["name"]
        assert f'"{name}"' in (rendered.REPOSITORY / "service" / "metrics.py").read_text()
        rule = yaml.safe_load((KUBERNETES / "examples" / "prometheus-adapter.yaml").read_text())["externalRules"][0]
        assert rule["name"]["as"] == name
        assert "replicas" not in find(objects, scaler["scaleTargetRef"]["kind"], "model-server")["spec"]
    else:
        server = find(objects, "Deployment", "model-server")
        (models,) = [volume for volume in pod_spec(server)["volumes"] if volume["name"] == "models"]
        assert set(models) == {"name", "emptyDir"}
        assert not [
            claim for claim in of_kind(objects, "PersistentVolumeClaim") if claim["metadata"]["name"] == "models"
        ]


def workloads():
    return [
        pytest.param(workload, id=f"{folder}-{workload['metadata']['name']}")
        for folder, workload in rendered.everything()
    ]


if rendered.shutil.which("kubectl"):  # what is parametrized below is rendered while tests are collected
    EVERY = pytest.mark.parametrize("workload", workloads())
else:
    EVERY = pytest.mark.parametrize("workload", [])


@EVERY
def test_pods_are_what_the_restricted_standard_asks_for(workload):
    spec = pod_spec(workload)
    context = spec["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] >= 10_000
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    for container in containers(workload):
        own = container["securityContext"]
        assert own["allowPrivilegeEscalation"] is False
        assert own["readOnlyRootFilesystem"] is True
        assert own["capabilities"] == {"drop": ["ALL"]}
        assert "privileged" not in own
        assert not [port for port in container.get("ports", []) if "hostPort" in port]
    assert not [volume for volume in spec["volumes"] if "hostPath" in volume]


@EVERY
def test_every_container_has_requests_limits_and_a_pinned_image(workload):
    for container in containers(workload):
        resources = container["resources"]
        for what in ("cpu", "memory"):
            assert resources["requests"][what]
            assert resources["limits"][what]
        name, _, tag = container["image"].rpartition(":")
        assert name
        assert tag[0].isdigit(), container["image"]


@EVERY
def test_every_server_has_three_probes_and_time_to_end(workload):
    if workload["kind"] == "Job":
        return
    for container in pod_spec(workload)["containers"]:
        ports = {port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            (handler,) = {"grpc", "tcpSocket"} & set(container[probe])
            assert container[probe][handler]["port"] in ports
        sleep = container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        assert pod_spec(workload)["terminationGracePeriodSeconds"] > sleep


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_gateway_has_time_to_drain_and_a_model_server_to_be_forgotten(name):
    objects = rendered.overlay(name)
    gateway = pod_spec(find(objects, "Deployment", "gateway"))
    container = gateway["containers"][0]
    drain = float(variables(container)["NTM_DRAIN_TIMEOUT"]["value"])
    stop = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert gateway["terminationGracePeriodSeconds"] >= stop + drain + 5
    server = pod_spec(find(objects, "Deployment", "model-server"))
    # The gateways look the name up every 10 s.
    assert server["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] > 10


def variables(container):
    return {variable["name"]: variable for variable in container["env"]}


@pytest.mark.parametrize("name", OVERLAYS)
def test_tensorflow_serving_is_not_waited_for_after_its_drain(name):
    """It ignores SIGTERM: whatever is left of the grace period after the hook is waited for in vain."""
    server = pod_spec(find(rendered.overlay(name), "Deployment", "model-server"))
    if "tensorflow/serving" not in server["containers"][0]["image"]:
        return
    sleep = server["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert 0 < server["terminationGracePeriodSeconds"] - sleep <= 10


@pytest.mark.parametrize("name", OVERLAYS)
def test_no_secret_is_in_the_manifests_and_each_is_referred_to(name):
    objects = rendered.overlay(name)
    assert not of_kind(objects, "Secret")
    container = pod_spec(find(objects, "Deployment", "gateway"))["containers"][0]
    assert variables(container)["NTM_STORE"]["valueFrom"]["secretKeyRef"] == {"name": "gateway-store", "key": "url"}
    text = yaml.safe_dump_all(objects)
    assert "redis://" not in text
    assert "PRIVATE KEY" not in text


def test_production_speaks_tls_and_asks_for_tokens():
    objects = rendered.overlay("production")
    gateway = pod_spec(find(objects, "Deployment", "gateway"))
    names = variables(gateway["containers"][0])
    assert {"NTM_TLS_CERT", "NTM_TLS_KEY", "NTM_TOKEN_FILE"} <= set(names)
    assert "NTM_INSECURE" not in names
    secrets = {volume["secret"]["secretName"] for volume in gateway["volumes"] if "secret" in volume}
    assert {"gateway-tls", "gateway-tokens", "gateway-snapshots", "gateway-store"} <= secrets
    assert not of_kind(objects, "StatefulSet"), "its store is outside"


@pytest.mark.parametrize("name", OVERLAYS)
def test_disruptions_take_one_at_a_time_and_the_autoscaler_owns_the_number(name):
    objects = rendered.overlay(name)
    for workload in ("gateway", "model-server"):
        budget = find(objects, "PodDisruptionBudget", workload)["spec"]
        labels = find(objects, "Deployment", workload)["spec"]["template"]["metadata"]["labels"]
        assert budget["maxUnavailable"] == 1
        assert budget["selector"]["matchLabels"].items() <= labels.items()
    scaler = find(objects, "HorizontalPodAutoscaler", "gateway")["spec"]
    assert scaler["scaleTargetRef"]["name"] == "gateway"
    assert "replicas" not in find(objects, "Deployment", "gateway")["spec"]
    assert 1 <= scaler["minReplicas"] < scaler["maxReplicas"]


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_pods_are_spread_over_zones_and_nodes(name):
    for workload in ("gateway", "model-server"):
        deployment = find(rendered.overlay(name), "Deployment", workload)
        spread = pod_spec(deployment)["topologySpreadConstraints"]
        assert {rule["topologyKey"] for rule in spread} == {"topology.kubernetes.io/zone", "kubernetes.io/hostname"}
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        assert all(rule["labelSelector"]["matchLabels"].items() <= labels.items() for rule in spread)


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_a_gpu_for_each_tensorflow_serving(name):
    container = pod_spec(find(rendered.overlay(name), "Deployment", "model-server"))["containers"][0]
    assert container["image"].endswith("-gpu")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1


@pytest.mark.parametrize("name", OVERLAYS)
def test_services_lead_to_ports_of_their_pods(name):
    objects = rendered.overlay(name)
    for service in of_kind(objects, "Service"):
        selector = service["spec"]["selector"]
        assert service["spec"]["clusterIP"] == "None", "clients balance by themselves"
        (workload,) = [
            thing
            for thing in of_kind(objects, "Deployment", "StatefulSet")
            if selector.items() <= thing["spec"]["template"]["metadata"]["labels"].items()
        ]
        ports = {port["name"]: port["containerPort"] for c in containers(workload) for port in c["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]


@pytest.mark.parametrize("name", ["gpu", "production"])
def test_service_monitors_lead_to_services_under_the_names_that_alerts_ask_for(name):
    objects = rendered.overlay(name)
    alerts = (rendered.REPOSITORY / "deploy" / "prometheus" / "alerts.yml").read_text()
    for monitor in of_kind(objects, "ServiceMonitor"):
        assert set(monitor["spec"]) == {"selector", "endpoints"}
        (service,) = [
            thing
            for thing in of_kind(objects, "Service")
            if monitor["spec"]["selector"]["matchLabels"].items() <= thing["metadata"]["labels"].items()
        ]
        for endpoint in monitor["spec"]["endpoints"]:
            assert endpoint["port"] in {port["name"] for port in service["spec"]["ports"]}
    gateway = find(objects, "ServiceMonitor", "gateway")["spec"]["endpoints"][0]
    assert gateway["path"] == "/metrics"
    assert gateway["relabelings"][0]["replacement"] in alerts


def test_the_cert_manager_example_makes_what_production_mounts():
    documents = list(yaml.safe_load_all((KUBERNETES / "examples" / "cert-manager.yaml").read_text()))
    certificate = find(documents, "Certificate", "gateway")
    issuer = find(documents, "Issuer", certificate["spec"]["issuerRef"]["name"])
    assert issuer["metadata"]["namespace"] == certificate["metadata"]["namespace"]
    volumes = pod_spec(find(rendered.overlay("production"), "Deployment", "gateway"))["volumes"]
    mounted = [volume["secret"]["secretName"] for volume in volumes if volume["name"] == "tls"]
    assert mounted == [certificate["spec"]["secretName"]]


def test_the_training_job_writes_where_the_servers_read_and_stops_at_what_it_cannot_mend():
    job = find(rendered.render("training"), "Job", "train-copy")
    trainer = pod_spec(job)["containers"][0]
    mounts = {mount["name"]: mount for mount in trainer["volumeMounts"]}
    assert f"--export-dir={mounts['models']['mountPath']}" in trainer["args"]
    assert "--only-solved" in trainer["args"]
    for name in OVERLAYS:
        server = pod_spec(find(rendered.overlay(name), "Deployment", "model-server"))
        (theirs,) = [v for v in server["volumes"] if v["name"] == "models"]
        (ours,) = [v for v in pod_spec(job)["volumes"] if v["name"] == "models"]
        assert theirs == ours
        mount = next(m for m in server["containers"][0]["volumeMounts"] if m["name"] == "models")
        assert mount["readOnly"] is True
