"""The health port, for those who ask without TLS, and the command that container engines ask with."""

import asyncio
import subprocess
import sys

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ntm_serving.v1 import sequence_service_pb2 as pb
from ntm_serving.v1 import sequence_service_pb2_grpc
from service import health
from service.config import Settings
from service.server import Gateway, StartError
from tests.service.sessions.valkey import free_port
from tests.service.support import NumpyExecutor, running_gateway


def certificates(folder):
    issued = trustme.CA().issue_cert("localhost")
    key, chain = folder / "key", folder / "chain"
    issued.private_key_pem.write_to_path(key)
    chain.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    return {"tls_key": key, "tls_cert": chain}


async def test_the_health_port_speaks_no_tls_and_answers_nothing_but_health(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    async with running_gateway(health_listen=address, **certificates(tmp_path)):
        async with grpc.aio.insecure_channel(address) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await sequence_service_pb2_grpc.SequenceServiceStub(channel).ListSessions(pb.ListSessionsRequest())
            assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
        asked = await ask(address)
        assert (asked.returncode, asked.stdout) == (0, "SERVING\n")
    gone = await ask(address)
    assert gone.returncode == 1
    assert gone.stdout.startswith("UNAVAILABLE")


async def ask(address):
    command = [sys.executable, "-m", "service.health", address]
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60, check=False)


async def test_it_says_not_serving_while_the_models_load(tmp_path):
    address = f"127.0.0.1:{free_port()}"
    settings = Settings(model_dir=tmp_path, listen="127.0.0.1:0", health_listen=address)
    gateway = Gateway(settings, executor=NumpyExecutor(), store=None)
    await gateway.listen()
    try:
        assert await asyncio_check(address) == "NOT_SERVING"
    finally:
        await gateway._server.stop(None)
        await gateway._health_server.stop(None)


async def asyncio_check(address):
    return await asyncio.to_thread(health.check, address)


async def test_a_health_port_that_is_taken_is_named(tmp_path):
    async with running_gateway(health_listen=(address := f"127.0.0.1:{free_port()}")):
        settings = Settings(model_dir=tmp_path, listen="127.0.0.1:0", health_listen=address)
        gateway = Gateway(settings, executor=NumpyExecutor(), store=None)
        with pytest.raises(StartError, match=f"cannot listen on {address}"):
            await gateway.listen()
        await gateway._server.stop(None)
        await gateway._health_server.stop(None)


def test_the_command_says_how_it_is_used(capsys):
    assert health.main([]) == 2
    assert "HOST:PORT" in capsys.readouterr().err
