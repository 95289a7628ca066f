"""The model server's life: load, listen, serve, drain."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import text_format
from tensorflow_serving.config import model_server_config_pb2

from service.model_server.config import Settings
from service.model_server.core import ServerCore
from service.model_server.errors import ServingError, invalid_argument
from service.model_server.manager import LoadPolicy
from service.model_server.saved_model import disable_xla
from service.model_server.services import ServingHandlers
from service.model_server.source import discover, version_policy

_log = logging.getLogger(__name__)


async def serve(settings: Settings) -> None:
    """Loads the models, then listens until SIGTERM or SIGINT.

    Raises:
        ServingError: the configuration is wrong, or a model could not be loaded.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    configuration = _configuration(settings)
    core = _core(settings)
    loading = loop.run_in_executor(None, core.start, *configuration)
    try:
        if await _loaded(loading, stop):
            await _listen(core, settings, stop)
    finally:
        core.close()
        with contextlib.suppress(ServingError):  # it gives up as soon as the core is closed
            await loading


async def _loaded(loading: "asyncio.Future[None]", stop: asyncio.Event) -> bool:
    """Waits for the models; returns False where the signal came first."""
    stopped = asyncio.create_task(stop.wait())
    pending: list[asyncio.Future[Any]] = [stopped, loading]
    await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if loading.done():
        loading.result()
        return True
    return False


async def _listen(core: ServerCore, settings: Settings, stop: asyncio.Event) -> None:
    handlers = ServingHandlers(
        core,
        max_threads=settings.grpc_max_threads,
        as_content=settings.enable_serialization_as_tensor_content,
        allow_reload=settings.allow_reload,
    )
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ]
    )
    if settings.enable_grpc_healthcheck_service:
        await _add_health(server)
    server.add_generic_rpc_handlers((handlers,))
    port = _bind(server, settings)
    await server.start()
    address = f"{settings.listen.rpartition(':')[0]}:{port}"
    if settings.port_file is not None:
        _write_atomically(settings.port_file, f"{port}\n")
    _log.info("listening on %s", address)
    await stop.wait()
    _log.info("draining: calls under way get %g s", settings.drain_timeout)
    core.monitor.close()  # a reload that waits for a model gives up
    await server.stop(settings.drain_timeout)
    handlers.close()


def _core(settings: Settings) -> ServerCore:
    if not settings.xla_cpu_compilation_enabled:
        disable_xla()
    return ServerCore(
        settings.model_dir,
        poll_interval=settings.file_system_poll_wait_seconds,
        load_policy=LoadPolicy(settings.max_num_load_retries, settings.load_retry_interval_seconds),
        labels_for_unavailable=settings.allow_version_labels_for_unavailable_models,
        warmup=settings.enable_model_warmup,
        intra_op_threads=settings.tensorflow_intra_op_parallelism,
    )


def _configuration(settings: Settings) -> tuple[Any, Callable[[], Any] | None]:
    """The ``ModelServerConfig`` to start with, and what finds models that appear later."""
    if settings.model_config_file is None:
        find = functools.partial(discover, settings.model_dir, version_policy(settings.version_policy))
        config = find()
        if not config.model_config_list.config:
            raise invalid_argument(f"no model in {settings.model_dir}: expected MODEL/VERSION/saved_model.pb")
        return config, find
    config = model_server_config_pb2.ModelServerConfig()
    try:
        text_format.Parse(settings.model_config_file.read_text(), config)
    except (text_format.ParseError, UnicodeDecodeError) as error:
        _log.error("%s: %s", settings.model_config_file, error)
        raise invalid_argument(f"Invalid protobuf file: '{settings.model_config_file}'") from error
    return config, None


def _bind(server: grpc.aio.Server, settings: Settings) -> int:
    if settings.tls_cert is None or settings.tls_key is None:
        return server.add_insecure_port(settings.listen)
    client_ca = settings.tls_client_ca.read_bytes() if settings.tls_client_ca is not None else None
    credentials = grpc.ssl_server_credentials(
        [(settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())],
        root_certificates=client_ca,
        require_client_auth=client_ca is not None,
    )
    return server.add_secure_port(settings.listen, credentials)


async def _add_health(server: grpc.aio.Server) -> None:
    from grpc_health.v1 import health, health_pb2_grpc

    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)


def _write_atomically(path: Path, text: str) -> None:
    """So that a script that waits for the file never reads half of it."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise
