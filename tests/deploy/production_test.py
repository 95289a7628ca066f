"""The production overlay's gateway as it ships: TLS, tokens, a store over TLS, and TensorFlow Serving's stand-in."""

import asyncio
import re
import ssl
import sys
from pathlib import Path

import grpc
import pytest
import trustme
import yaml

from service.client import GatewayError, SequenceClient
from tests.deploy import rendered
from tests.deploy.deployment_test import secrets
from tests.deploy.pods import Cluster
from tests.deploy.rendered import KUBERNETES
from tests.deploy.traffic import MODEL
from tests.service.client.gateways import LoopThread
from tests.service.executors.sequence_models import export_sums
from tests.service.security_test import sha256
from tests.service.sessions.valkey import Valkey, free_port

pytestmark = rendered.needs_kubectl

TOKEN = "a token of the shop's"  # of this test
# What ntm-model-server calls TensorFlow Serving's flags; those that it has nothing for are left out.
STAND_IN = {
    "port": "--listen=ADDRESS:{}",
    "model_config_file": "--model-config-file={}",
    "file_system_poll_wait_seconds": "--file-system-poll-wait-seconds={}",
    "enable_model_warmup": "--enable-model-warmup",
    "enable_grpc_healthcheck_service": "--enable-grpc-healthcheck-service",
    "enable_serialization_as_tensor_content": "--enable-serialization-as-tensor-content",
}
HAS_NOTHING = {"rest_api_port", "model_config_file_poll_wait_seconds", "monitoring_config_file"}


class TlsFront:
    """Ends the TLS in front of a server: the tests' Valkey is built without."""

    def __init__(self, port, certificate):
        self._port = port
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        certificate.configure_cert(self._context)
        self._thread = LoopThread()
        self._server = self._thread.run(asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context))
        self.port = self._server.sockets[0].getsockname()[1]

    async def _serve(self, reader, writer):
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._port)
        await asyncio.gather(_pump(reader, to_writer), _pump(to_reader, writer))

    def close(self):
        self._thread.call(self._server.close)
        self._thread.close()


async def _pump(reader, writer):
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


def stand_in(models, address):
    """Turns tensorflow_model_server's arguments into ntm-model-server's."""

    def command(arguments):
        given = dict(re.fullmatch(r"--(\w+)=(.*)", word).groups() for word in arguments)
        assert set(given) <= STAND_IN.keys() | HAS_NOTHING, "say what stands in for it"
        assert all(given[name] == "true" for name in given if name.startswith("enable_"))
        words = [STAND_IN[name].format(given[name]).replace("ADDRESS", address) for name in given.keys() & STAND_IN]
        program = str(Path(sys.executable).with_name("ntm-model-server"))
        return [program, "--model-dir", str(models), "--insecure", *words]

    return command


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def store(authority, tmp_path_factory):
    """What an operator would have outside: a Valkey with the users of deploy/secrets.sh, behind TLS."""
    folder = tmp_path_factory.mktemp("store")
    made = secrets(folder / "secrets")
    valkey = Valkey(folder / "valkey", port=free_port(), aclfile=str(folder / "secrets" / "users.acl"))
    valkey.start(wait=False)
    front = TlsFront(valkey.port, authority.issue_cert("localhost"))
    url = (
        made["gateway-store"]["url"].replace("redis://", "rediss://").replace("valkey:6379", f"localhost:{front.port}")
    )
    yield made, f"{url}?ssl_ca_certs=/etc/ntm/store/ca.crt"
    front.close()
    valkey.process.kill()
    valkey.process.wait()


@pytest.fixture(scope="module")
def gateway(authority, store, tmp_path_factory):
    certificate = yaml.safe_load((KUBERNETES / "examples" / "cert-manager.yaml").read_text().split("\n---")[0])
    issued = authority.issue_cert(*certificate["spec"]["dnsNames"])
    made, url = store
    made |= {
        "gateway-store": {"url": url, "ca.crt": authority.cert_pem.bytes()},
        "gateway-tls": {
            "tls.key": issued.private_key_pem.bytes(),
            "tls.crt": b"".join(pem.bytes() for pem in issued.cert_chain_pems),
        },
        "gateway-tokens": {"tokens.toml": f'[shop]\ntokens_sha256 = ["{sha256(TOKEN)}"]\n'},
    }
    folder = tmp_path_factory.mktemp("production")
    replicas = {"model-server": 1, "gateway": 1}
    cluster = Cluster(rendered.overlay("production"), folder, secrets=made, replicas=replicas, first=40)
    models = cluster.claim("models")
    export_sums(models, MODEL, 1)
    try:
        (address,) = cluster.addresses("model-server")
        for pod in (cluster.start("model-server", command=stand_in(models, address)), cluster.start("gateway")):
            pod.wait_ready()
        yield cluster.pods[-1]
    finally:
        cluster.stop()


def client(gateway, authority=None, **options):
    options = {"timeout": 5, "options": [("grpc.ssl_target_name_override", "gateway.ntm-serving")], **options}
    if authority is not None:
        options["credentials"] = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    return SequenceClient(f"{gateway.address}:50051", **options)


def test_its_clients_step_over_tls_with_a_token(gateway, authority):
    with client(gateway, authority, token=TOKEN) as shop, shop.session(MODEL) as session:
        assert session.step([[1.0, 2.0, 3.0], [1.0, 0.0, 0.0]]).tolist() == [[1.0, 2.0, 3.0], [2.0, 2.0, 3.0]]
        assert session.info().version == 1


def test_nobody_else_does(gateway, authority):
    with client(gateway, authority, token="another") as stranger, pytest.raises(GatewayError, match="UNAUTHENTICATED"):
        stranger.models()
    with client(gateway, authority) as nobody, pytest.raises(GatewayError, match="UNAUTHENTICATED"):
        nobody.models()
    with client(gateway, trustme.CA(), token=TOKEN, timeout=1) as deceived, pytest.raises(GatewayError):
        deceived.models()
    with client(gateway, timeout=1) as plain, pytest.raises(GatewayError):
        plain.models()
    assert gateway.probe("livenessProbe"), "the kubelet asks without TLS, on a port of its own"


def test_a_certificate_that_was_renewed_is_taken_on_without_a_restart(gateway):
    issuer = trustme.CA()
    issued = issuer.issue_cert("gateway.ntm-serving")
    folder = gateway.mount("/etc/ntm/tls")
    for name, content in (
        ("tls.key", issued.private_key_pem.bytes()),
        ("tls.crt", b"".join(pem.bytes() for pem in issued.cert_chain_pems)),
    ):
        (folder / f"{name}.new").write_bytes(content)
    for name in ("tls.key", "tls.crt"):
        (folder / f"{name}.new").replace(folder / name)
    with client(gateway, issuer, token=TOKEN) as shop:
        assert [model.name for model in shop.models()] == [MODEL]
