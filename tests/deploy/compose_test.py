"""The compose file: what it mounts is there, nothing is published but on loopback, nobody is root or may write."""

import re
from pathlib import Path

import pytest
import yaml

from tests.deploy import images
from tests.deploy.rendered import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]

EVERY = pytest.mark.parametrize("name", SERVICES)


def sources(service):
    for volume in service.get("volumes", []):
        source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
        if source.startswith("."):
            yield source
        else:
            assert source in COMPOSE["volumes"], volume


def test_it_has_two_gateways_a_store_a_model_server_and_what_watches_them():
    assert set(SERVICES) == {
        *("gateway-1", "gateway-2", "tf-serving", "model-server", "valkey", "prometheus", "grafana")
    }
    assert SERVICES["model-server"]["profiles"] == ["drop-in"]
    ours = [SERVICES[name]["networks"]["inside"]["aliases"] for name in ("tf-serving", "model-server")]
    assert ours == [["models"], ["models"]]
    for name in ("gateway-1", "gateway-2"):
        assert SERVICES[name]["environment"]["NTM_TF_SERVING"] == "dns:///models:8500"
        assert SERVICES[name]["networks"]["inside"]["aliases"] == ["gateway"], "as Prometheus looks them up"


@EVERY
def test_what_it_mounts_is_in_the_repository_or_made_by_the_documented_command(name):
    made = {"secrets/users.acl", "../../models"}
    for source in sources(SERVICES[name]):
        if source.removeprefix("./") not in made:
            assert (FOLDER / source).exists(), source
    script = (REPOSITORY / "deploy" / "secrets.sh").read_text()
    for file in (*SERVICES[name].get("env_file", []), *(s["file"] for s in COMPOSE["secrets"].values())):
        assert f'$1/{Path(file).name}"' in script


@EVERY
def test_it_is_closed_and_pinned(name):
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert re.search(r":v?\d+\.\d+\.\d+$", service["image"])
    if service["image"].startswith("ntm-serving/"):
        assert service["build"]["target"] in images.stages()


def test_there_is_no_way_out_for_models_and_store():
    assert COMPOSE["networks"]["inside"]["internal"] is True
    for name in ("tf-serving", "model-server", "valkey"):
        assert set(SERVICES[name]["networks"]) == {"inside"}


def test_the_gateways_may_end_what_they_drain():
    from service.config import Settings

    drain = Settings.model_fields["drain_timeout"].default
    assert int(SERVICES["gateway-1"]["stop_grace_period"].removesuffix("s")) >= drain + 5
