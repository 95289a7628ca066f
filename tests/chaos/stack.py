"""The real thing, in processes of its own: two gateways, a model server, a Valkey, and proxies on the ways between."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.chaos.model import NAME
from tests.service.sessions.proxy import Proxy
from tests.service.sessions.valkey import Valkey, free_port

GATEWAYS = 2


class Process:
    """One process that listens on one port for good, however often it is killed and started again."""

    def __init__(self, folder, name, command):
        self.port = free_port()
        self.log = folder / f"{name}.log"
        self._command = [part.replace("PORT", str(self.port)) for part in command]
        self._process = None

    def start(self):
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2"}
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)

    def send(self, number):
        self._process.send_signal(number)

    def kill(self):
        self._process.kill()
        self._process.wait()

    async def wait_ended(self, limit=40.0):
        await asyncio.to_thread(self._process.wait, limit)

    async def wait_serving(self, limit=120.0):
        """Returns once its health is SERVING; each look is a new channel, as the process may have died between."""
        async with asyncio.timeout(limit):
            while not await self._is_serving():
                if self._process.poll() is not None:
                    raise RuntimeError(f"{self._command[0]} ended with {self._process.returncode}: see {self.log}")
                await asyncio.sleep(0.1)

    async def _is_serving(self):
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            check = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2)
            try:
                return (await check).status == health_pb2.HealthCheckResponse.SERVING
            except grpc.aio.AioRpcError:
                return False

    def stop(self):
        if self._process is not None and self._process.poll() is None:
            self.send(signal.SIGCONT)
            self.kill()


class Stack:
    """Everything, started by ``start`` and ended by ``stop``."""

    def __init__(self, folder: Path, models: Path):
        self.folder = folder
        self.models = models
        self.valkey = Valkey(folder / "valkey", port=free_port(), appendonly="yes", appendfsync="always")
        server = (
            sys.executable,
            "-m",
            "service.model_server",
            "--model-dir",
            str(models),
            "--listen",
            "127.0.0.1:PORT",
        )
        self.model_server = Process(folder, "model-server", [*server, "--enable-grpc-healthcheck-service"])
        self.gateways = []
        self.to_store = []  # of each gateway, its way to Valkey
        self.to_gateway = []  # of the clients, their way to each gateway

    async def start(self):
        await asyncio.to_thread(self.valkey.start)
        self.model_server.start()
        await self.model_server.wait_serving()
        for number in range(GATEWAYS):
            self.to_store.append(await Proxy(self.valkey.port).start())
            gateway = Process(self.folder, f"gateway-{number}", self._gateway_command(self.to_store[-1]))
            gateway.start()
            self.gateways.append(gateway)
            self.to_gateway.append(await Proxy(gateway.port).start())
        for gateway in self.gateways:
            await gateway.wait_serving()
        return self

    async def stop(self):
        for process in (*self.gateways, self.model_server):
            process.stop()
        self.valkey.stop()
        for proxy in (*self.to_store, *self.to_gateway):
            await proxy.close()

    def addresses(self):
        """Where the clients find the gateways."""
        return [f"127.0.0.1:{proxy.port}" for proxy in self.to_gateway]

    def refusals(self):
        """Commits that the store refused, by what it said that the step was."""
        lines = [line for gateway in self.gateways for line in gateway.log.read_text().splitlines()]
        refused = [line for line in lines if "a commit was refused" in line]
        return {
            word: sum(f"'{word}'" in line for line in refused) for word in ("replay", "run", "mismatch", "conflict")
        }

    def _gateway_command(self, to_store):
        serve = str(Path(sys.executable).with_name("ntm-serve"))
        options = {
            "--listen": "127.0.0.1:PORT",
            "--tf-serving": f"127.0.0.1:{self.model_server.port}",
            "--model": NAME,
            "--store": to_store.url,
            "--store-timeout": "1",
            "--executor-timeout": "5",
            "--drain-timeout": "5",
            "--log-format": "json",
        }
        return [serve, *(word for option in options.items() for word in option)]
