"""Gateways over each executor, and over TLS, for the clients' own tests."""

import hashlib

import grpc
import pytest
import trustme

from service.executors.embedded import EmbeddedExecutor
from service.executors.tf_serving import TfServingExecutor
from service.sessions.memory import MemoryStore
from tests.integration.clients import sums
from tests.service.client.gateways import AsyncFace, BlockingFace, GatewayThread, LoopThread
from tests.service.model_server.processes import running_model_server

TOKEN = "a token of the tests"


@pytest.fixture(scope="module")
def threads():
    thread = LoopThread()
    yield thread
    thread.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    sums.export(directory)
    return directory


class Served(GatewayThread):
    """A gateway whose model obeys no test."""

    def close(self):
        self._threads.run(self._stack.aclose())


@pytest.fixture(scope="module", params=["embedded", "embedded over TLS with tokens", "model server"])
def running(request, threads, models, tmp_path_factory):
    """A gateway, and what a client has to be told to connect to it."""
    folder = tmp_path_factory.mktemp("gateway")
    if request.param == "model server":
        with running_model_server(models, folder) as server:
            gateway = Served(threads, executor=TfServingExecutor(server.address, models=["sums"]))
            yield gateway, {}
            gateway.close()
        return
    settings, options = secured(folder) if "TLS" in request.param else ({}, {})
    gateway = Served(threads, executor=EmbeddedExecutor(models, compile=False), **settings)
    yield gateway, options
    gateway.close()


def secured(folder):
    """Settings for TLS and a token, and the options of a client that has both."""
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    files = {"tls_key": folder / "tls.key", "tls_cert": folder / "tls.crt", "token_file": folder / "tokens.toml"}
    files["tls_key"].write_bytes(leaf.private_key_pem.bytes())
    files["tls_cert"].write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    files["token_file"].write_text(f'[tester]\ntokens_sha256 = ["{hashlib.sha256(TOKEN.encode()).hexdigest()}"]\n')
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    return files, {"credentials": credentials, "token": TOKEN}


@pytest.fixture
def gateway(running, threads):
    """The gateway; its sessions end with the test."""
    yield running[0]
    threads.run(MemoryStore.close(running[0].store))


@pytest.fixture(params=[BlockingFace, AsyncFace], ids=["blocking", "asyncio"])
def connect(request, running, threads):
    """Connects clients, of both kinds in turn; they end with the test."""
    clients = []

    def start(target, **options):
        clients.append(request.param(threads, target, **running[1], **options))
        return clients[-1]

    yield start
    for client in clients:
        client.close()


@pytest.fixture
def client(connect, gateway):
    return connect(gateway.target, timeout=60)
