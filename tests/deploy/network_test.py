"""Who may talk to whom, worked out of the rendered NetworkPolicies as a network plugin would."""

import ipaddress

import pytest

from tests.deploy import rendered
from tests.deploy.rendered import OVERLAYS, of_kind

pytestmark = rendered.needs_kubectl

HOME = {"kubernetes.io/metadata.name": "ntm-serving"}
CLIENTS = {"kubernetes.io/metadata.name": "shop", "ntm-serving.io/client": "true"}
MONITORING = {"kubernetes.io/metadata.name": "prometheus", "ntm-serving.io/monitoring": "true"}
STRANGERS = {"kubernetes.io/metadata.name": "elsewhere"}
SYSTEM = {"kubernetes.io/metadata.name": "kube-system"}


def pod(name, namespace=HOME):
    return {"labels": {"app.kubernetes.io/name": name}, "namespace": namespace}


GATEWAY, SERVER, VALKEY, TRAINER = (pod(name) for name in ("gateway", "model-server", "valkey", "trainer"))
CLIENT, PROMETHEUS, STRANGER = pod("app", CLIENTS), pod("prometheus", MONITORING), pod("app", STRANGERS)
DNS = {"labels": {"k8s-app": "kube-dns"}, "namespace": SYSTEM}
STORE = {"address": "192.0.2.7"}
INTERNET = {"address": "8.8.8.8"}


def matches(selector, labels):
    assert set(selector) <= {"matchLabels"}
    return selector.get("matchLabels", {}).items() <= labels.items()


def is_peer(peer, other):
    if "ipBlock" in peer:
        return "address" in other and ipaddress.ip_address(other["address"]) in ipaddress.ip_network(
            peer["ipBlock"]["cidr"]
        )
    if "address" in other:
        return False
    there = (
        matches(peer["namespaceSelector"], other["namespace"])
        if "namespaceSelector" in peer
        else (other["namespace"] == HOME)
    )
    return there and matches(peer.get("podSelector", {}), other["labels"])


def passes(policies, direction, subject, other, port, protocol="TCP"):
    """Whether a pod's own policies let this through; one that none selects is open."""
    if subject.get("namespace") != HOME:
        return True
    kind, key, side = ("Egress", "egress", "to") if direction == "out" else ("Ingress", "ingress", "from")
    mine = [
        policy["spec"]
        for policy in policies
        if kind in policy["spec"]["policyTypes"] and matches(policy["spec"]["podSelector"], subject["labels"])
    ]
    rules = [rule for spec in mine for rule in spec.get(key, [])]
    return not mine or any(
        any(is_peer(peer, other) for peer in rule[side])
        and any(p["port"] == port and p["protocol"] == protocol for p in rule["ports"])
        for rule in rules
    )


def allowed(policies, source, target, port, protocol="TCP"):
    return passes(policies, "out", source, target, port, protocol) and passes(
        policies, "in", target, source, port, protocol
    )


@pytest.fixture(params=OVERLAYS)
def name(request):
    return request.param


@pytest.fixture
def policies(name):
    return of_kind(rendered.overlay(name), "NetworkPolicy")


def test_a_gateway_reaches_its_model_servers_its_store_and_names_and_nothing_else(policies, name):
    store = STORE if name == "production" else VALKEY
    assert allowed(policies, GATEWAY, SERVER, 8500)
    assert allowed(policies, GATEWAY, store, 6379)
    assert allowed(policies, GATEWAY, DNS, 53, "UDP")
    for target, port in ((SERVER, 8501), (INTERNET, 443), (INTERNET, 6379), (STRANGER, 80), (GATEWAY, 50051)):
        assert not allowed(policies, GATEWAY, target, port)


def test_only_gateways_reach_model_servers_and_the_store(policies):
    for source in (CLIENT, STRANGER, PROMETHEUS, TRAINER, VALKEY, SERVER):
        assert not allowed(policies, source, SERVER, 8500)
        assert not allowed(policies, source, VALKEY, 6379)


def test_a_gateway_is_closed_to_all_but_the_namespaces_of_its_clients(policies):
    assert allowed(policies, CLIENT, GATEWAY, 50051)
    for source in (STRANGER, PROMETHEUS, TRAINER, SERVER):
        assert not allowed(policies, source, GATEWAY, 50051)
    assert allowed(policies, PROMETHEUS, GATEWAY, 9464)
    for source in (CLIENT, STRANGER):
        assert not allowed(policies, source, GATEWAY, 9464)
        assert not allowed(policies, source, GATEWAY, 50052)


def test_model_servers_store_and_trainers_reach_nobody(policies):
    for source in (SERVER, VALKEY, TRAINER):
        for target, port in ((INTERNET, 443), (GATEWAY, 50051), (VALKEY, 6379), (STRANGER, 80)):
            assert not allowed(policies, source, target, port)


def test_metrics_of_tensorflow_serving_are_for_monitoring_alone(policies, name):
    assert allowed(policies, PROMETHEUS, SERVER, 8501) is (name != "dev")
    assert not allowed(policies, CLIENT, SERVER, 8501)
