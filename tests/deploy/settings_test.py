"""Every flag, variable and port of the manifests and the compose file is one that the programs have."""

import re
import shlex

import pytest
import yaml
from google.protobuf import text_format

from service.config import Settings, read_settings
from service.model_server.config import Settings as ModelServerSettings
from tests.deploy import images, rendered
from tests.deploy.rendered import KUBERNETES, REPOSITORY
from tests.service.sessions.valkey import documented_users
from training.train import parser

COMPOSE = REPOSITORY / "deploy" / "compose" / "compose.yaml"

# Of tensorflow_model_server 2.19, as its main.cc lists them; those that a deployment of this project may want.
TENSORFLOW_MODEL_SERVER = {
    *("port", "rest_api_port", "model_config_file", "model_config_file_poll_wait_seconds"),
    *("file_system_poll_wait_seconds", "monitoring_config_file", "ssl_config_file", "enable_model_warmup"),
    *("enable_grpc_healthcheck_service", "enable_serialization_as_tensor_content", "grpc_max_threads"),
    *("xla_cpu_compilation_enabled", "xla_gpu_compilation_enabled", "max_num_load_retries", "num_load_threads"),
    *("grpc_channel_arguments", "per_process_gpu_memory_fraction", "tensorflow_session_parallelism"),
}


def of_kubernetes():
    """``(where, image, command, arguments, variables, ports)`` of every container that is rendered."""
    for folder, workload in rendered.everything():
        for c in rendered.containers(workload):
            variables = {v["name"]: v.get("value") for v in c.get("env", [])}
            ports = {port["containerPort"] for port in c.get("ports", [])}
            where = f"{folder}-{workload['metadata']['name']}"
            yield where, c["image"], c.get("command", []), c.get("args", []), variables, ports


def of_compose():
    for name, service in yaml.safe_load(COMPOSE.read_text())["services"].items():
        variables = {
            key: None if value is None else str(value) for key, value in service.get("environment", {}).items()
        }
        words = [service.get(key, []) for key in ("entrypoint", "command")]
        command, arguments = (shlex.split(text) if isinstance(text, str) else text for text in words)
        yield f"compose-{name}", service["image"], command, arguments, variables, set()


def everything():
    found = [*of_compose(), *(of_kubernetes() if rendered.shutil.which("kubectl") else ())]
    return [pytest.param(*container[1:], id=container[0]) for container in found]


EVERY = pytest.mark.parametrize(("image", "command", "arguments", "variables", "ports"), everything())


def flag(word):
    """``--listen=0.0.0.0:1`` -> ``listen``."""
    return re.match(r"--(?:no-)?([a-z0-9_-]+)", word)[1]


def program(image, command):
    """What runs: the command, or the image's own; None for what is not ours to check."""
    if image.startswith("ntm-serving/"):
        return (command or images.entrypoint(image))[-1]
    return {"tensorflow/serving": "tensorflow_model_server"}.get(image.rpartition(":")[0])


@EVERY
def test_it_is_in_the_code(image, command, arguments, variables, ports):
    what = program(image, command)
    if what == "ntm-serve":
        known = Settings.model_fields
        for name in variables:
            assert name.startswith("NTM_"), name
            assert name.removeprefix("NTM_").lower() in known, name
        assert {flag(word).replace("-", "_") for word in arguments} <= set(known)
        listens = {int(v.rpartition(":")[2]) for k, v in variables.items() if k.endswith("LISTEN")}
        assert ports <= listens
    elif what == "ntm-model-server":
        known = ModelServerSettings.model_fields
        assert {flag(word).replace("-", "_") for word in arguments} <= set(known)
        assert all(name.removeprefix("NTM_MODEL_SERVER_").lower() in known for name in variables)
        assert ports <= {int(word.rpartition(":")[2]) for word in arguments if word.startswith("--listen=")}
    elif what == "training.train":
        parser().parse_args(arguments)
    elif what == "tensorflow_model_server":
        assert {flag(word) for word in arguments} <= TENSORFLOW_MODEL_SERVER
        told = {int(word.rpartition("=")[2]) for word in arguments if re.match(r"--(rest_api_)?port=", word)}
        assert ports <= told


def test_tensorflow_serving_s_configurations_are_what_it_parses():
    from tensorflow_serving.config import model_server_config_pb2

    folder = KUBERNETES / "components" / "tensorflow-serving"
    models = model_server_config_pb2.ModelServerConfig()
    text_format.Parse((folder / "models.config").read_text(), models)
    (model,) = models.model_config_list.config
    assert model.model_version_policy.HasField("all")
    monitoring = (folder / "monitoring.config").read_text()
    assert monitoring == (REPOSITORY / "deploy" / "prometheus" / "tf_serving_monitoring.config").read_text()


def test_the_store_s_users_are_the_documented_ones():
    default, gateway = (REPOSITORY / "deploy" / "valkey" / "users.acl").read_text().splitlines()
    assert default == "user default off resetkeys resetchannels -@all"
    assert gateway == f"user gateway on #SHA256_OF_PASSWORD {documented_users()[0]}"


def gateways():
    return [param for param in everything() if program(param.values[0], param.values[1]) == "ntm-serve"]


@pytest.mark.parametrize(("image", "command", "arguments", "variables", "ports"), gateways())
def test_a_gateway_takes_its_settings_together(image, command, arguments, variables, ports, tmp_path, monkeypatch):
    """Above all: it does not refuse to listen where it is told to."""
    for name, value in {"NTM_STORE": "redis://valkey:6379/0", **variables}.items():
        if value is not None:
            if value.startswith(("/etc/", "/run/")):  # a file that a Secret becomes
                (tmp_path / name).write_bytes(bytes(32))
                value = str(tmp_path / name)
            monkeypatch.setenv(name, value)
    settings = read_settings(arguments)
    assert settings.listen == "0.0.0.0:50051"
    assert settings.model == ["copy"]
    assert settings.tf_serving.startswith("dns:///")
    assert settings.metrics_listen == "0.0.0.0:9464"
    assert settings.insecure is (variables.get("NTM_INSECURE") == "true")
