"""``ntm-serve``: starts the gateway, serves, and drains when it is told to end."""

import asyncio
import contextlib
import gc
import logging
import os
import secrets
import signal
import sys
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import grpc
from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from ntm_serving.v1 import (
    model_service_pb2,
    model_service_pb2_grpc,
    sequence_service_pb2,
    sequence_service_pb2_grpc,
)
from service.admission import Admission
from service.auth import Anyone, TokenFile
from service.backends import make_executor, make_store, make_tracing
from service.batcher import Batcher, BatchPolicy
from service.config import Settings, SettingsError, read_settings, shown
from service.engine import Engine
from service.errors import ModelLoadError
from service.executors import Executor
from service.interceptors import Authenticator, CallInterceptor
from service.limits import Limits
from service.logs import RequestLog, configure_logging
from service.loops import loop_factory
from service.memory import heaps, tidy_forever
from service.monitor import Monitor
from service.seal import Sealer
from service.servicer import ModelServicer, SequenceServicer, forms
from service.sessions import SessionStore
from service.stepping import Stepping
from service.tls import Certificates

if TYPE_CHECKING:
    from service.tracing import Tracing

_log = logging.getLogger(__name__)

_SERVICES = (
    sequence_service_pb2.DESCRIPTOR.services_by_name["SequenceService"].full_name,
    model_service_pb2.DESCRIPTOR.services_by_name["ModelService"].full_name,
)
_SWEEP_EVERY_S = 5.0
# How long after a short chunk the long ones still leave room for one: about as long as its client takes for the next.
_SHARED_S = 0.25
_RELOAD_EVERY_S = 1.0
_SECRET_BYTES = 32
# How long calls that are not steps (a slow reader's stream, a ListModels) get once every step is answered.
_STOP_GRACE_S = 1.0
# How long the traces that are held get to be sent.
_FLUSH_S = 2.0


class StartError(Exception):
    """The gateway cannot start; the text is for the operator."""


class Gateway:
    """One gateway: its engine, its gRPC server and its health, from start to drained.

    Args:
        settings: What to run with.
        executor: Runs the models; the gateway starts and closes it.
        store: Keeps the sessions; the gateway closes it.
        tracing: Makes spans of what happens; the gateway closes it. None: nothing is traced.

    Raises:
        SettingsError: a file that they name is not what it should be.
    """

    def __init__(
        self, settings: Settings, *, executor: Executor, store: SessionStore, tracing: "Tracing | None" = None
    ) -> None:
        self._settings = settings
        self._tracing = tracing
        if tracing is not None:
            executor = tracing.executor(executor, remote=settings.tf_serving is not None)
            store = tracing.store(store, remote=settings.store != "memory")
        clock = asyncio.get_running_loop().time
        self.monitor = Monitor(settings)
        observer = self.monitor.observer
        batcher = Batcher(
            executor,
            policy=_batch_policy(settings),
            clock=clock,
            observer=observer,
            origin=tracing.origin if tracing else None,
        )
        admission = Admission(max_steps=settings.max_queued_steps, max_bytes=settings.max_queued_bytes)
        self.engine = Engine(
            store=store, executor=executor, batcher=batcher, admission=admission, clock=clock, observer=observer
        )
        self.monitor.watch(admission, batcher)
        self._requests = RequestLog(settings.log_sample)
        self._health = health_aio.HealthServicer()
        self._authenticator = _authenticator(settings)
        self._credentials = _credentials(settings)
        self._sealer = Sealer(_secret(settings))
        calls = CallInterceptor(
            self._authenticator, observer, self._requests, settings.max_message_bytes, forms(settings.max_message_bytes)
        )
        self._server = grpc.aio.server(
            interceptors=[tracing.interceptor(), calls] if tracing else [calls],
            options=_server_options(settings),
        )
        self._health_server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        self._tasks: list[asyncio.Task[None]] = []

    async def listen(self) -> int:
        """Opens the port and answers on it, NOT_SERVING yet.

        Returns:
            The port.

        Raises:
            StartError: the address cannot be listened on.
        """
        limits = _limits(self._settings)
        span = self._tracing.step if self._tracing else None
        stepping = Stepping(self.engine, limits, self.monitor.observer, self._requests, span)
        servicer = SequenceServicer(self.engine, stepping, limits, self._sealer)
        sequence_service_pb2_grpc.add_SequenceServiceServicer_to_server(servicer, self._server)
        model_service_pb2_grpc.add_ModelServiceServicer_to_server(ModelServicer(self.engine), self._server)
        self._server.add_generic_rpc_handlers((health_handlers(self._health),))
        reflection.enable_server_reflection(
            (*_SERVICES, "grpc.health.v1.Health", reflection.SERVICE_NAME), self._server
        )
        # gRPC's own health servicer says SERVING until told otherwise.
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        port = _bind(self._server, self._settings.listen, self._credentials)
        if self._settings.health_listen is not None:
            self._health_server.add_generic_rpc_handlers((health_handlers(self._health),))
            _bind(self._health_server, self._settings.health_listen, None)
            await self._health_server.start()
        try:
            self.monitor.listen()
        except OSError as error:
            raise StartError(f"cannot listen on {self._settings.metrics_listen}: {error.strerror or error}") from None
        await self._server.start()
        return port

    async def open(self) -> None:
        """Loads the models; from then on the gateway is SERVING.

        Raises:
            ModelLoadError: there is nothing to serve.
        """
        await self.engine.start()
        self._tasks = [
            asyncio.create_task(self.engine.sweep_forever(_SWEEP_EVERY_S)),
            asyncio.create_task(_reload_forever(self._authenticator)),
            asyncio.create_task(tidy_forever()),
        ]
        self.monitor.start(self.engine)
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    async def drain(self) -> bool:
        """Takes nothing new, lets what is under way finish, and closes; returns whether all of it did finish."""
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        finished = await self.engine.drain(self._settings.drain_timeout)
        await self._server.stop(_STOP_GRACE_S)
        for task in self._tasks:
            task.cancel()
        self.monitor.stop()
        await self.engine.close()
        await self.monitor.close()
        await self._health_server.stop(None)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close, _FLUSH_S)
        return finished

    async def _set_health(self, status: int) -> None:
        self.monitor.observer.serving(now=status == health_pb2.HealthCheckResponse.SERVING)
        for name in ("", *_SERVICES):
            await self._health.set(name, status)


def _bind(server: grpc.aio.Server, address: str, credentials: grpc.ServerCredentials | None) -> int:
    """Has the server listen there; returns the port."""
    try:
        if credentials is None:
            return server.add_insecure_port(address)
        return server.add_secure_port(address, credentials)
    except RuntimeError:
        raise StartError(f"cannot listen on {address}: is another server running there?") from None


def health_handlers(servicer: health_aio.HealthServicer) -> grpc.GenericRpcHandler:
    """The handlers of ``grpc.health.v1.Health``."""
    return grpc.method_handlers_generic_handler(
        "grpc.health.v1.Health",
        {
            "Check": grpc.unary_unary_rpc_method_handler(
                servicer.Check,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            ),
            "Watch": grpc.unary_stream_rpc_method_handler(
                servicer.Watch,
                request_deserializer=health_pb2.HealthCheckRequest.FromString,
                response_serializer=health_pb2.HealthCheckResponse.SerializeToString,
            ),
        },
    )


async def serve(settings: Settings) -> int:
    """Runs the gateway that the settings describe; see ``serve_with``."""
    return await serve_with(
        settings, executor=make_executor(settings), store=make_store(settings), tracing=make_tracing(settings)
    )


async def serve_with(
    settings: Settings, *, executor: Executor, store: SessionStore, tracing: "Tracing | None" = None
) -> int:
    """Runs a gateway until SIGTERM or SIGINT; returns the exit code: 0 where everything under way was answered."""
    started = time.monotonic()
    heaps()
    _suit_the_interpreter()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    gateway = Gateway(settings, executor=executor, store=store, tracing=tracing)
    try:
        _announce(settings, await gateway.listen(), gateway.monitor.port)
        if await _unless(stop, gateway.open()):
            _log.info("serving", extra=_what_is_served(gateway, time.monotonic() - started))
            await stop.wait()
    except (StartError, ModelLoadError):
        await gateway.drain()
        raise
    _log.info("draining")
    finished = await gateway.drain()
    _log.info("stopped" if finished else "stopped with steps unanswered")
    return 0 if finished else 1


def command() -> NoReturn:
    """The ``ntm-serve`` command: ``main``, and then the end of the process, at once.

    A model that is being compiled cannot be interrupted, and the interpreter must not be taken apart under it.
    """
    code = main()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the settings and serves; returns the exit code."""
    heaps()
    try:
        settings = read_settings(argv)
        if settings.check:
            print(shown(settings))
            return 0
        configure_logging(settings.log_level, settings.log_format)
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(serve(settings))
    except (SettingsError, StartError, ModelLoadError) as error:
        print(f"ntm-serve: {error}", file=sys.stderr)
        return 2 if isinstance(error, SettingsError) else 1


def _suit_the_interpreter() -> None:
    """Settings of Python's own that suit a server: a few microseconds a step (docs/design.md)."""
    # What a step makes is freed by its reference counts; the collector's looks for cycles may be fewer.
    gc.set_threshold(10_000, 20, 20)
    # What is there by now stays.
    gc.collect()
    gc.freeze()
    # A thread that has run a batch waits no longer than this for the interpreter, however much there is to parse.
    sys.setswitchinterval(0.001)


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Does ``work`` unless ``stop`` comes first; returns whether it was done."""
    doing, stopping = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((doing, stopping), return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            doing.result()
            return True
        doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await doing
        return False
    finally:
        stopping.cancel()


def _announce(settings: Settings, port: int, metrics_port: int | None) -> None:
    address = f"{settings.listen_host}:{port}"
    print(f"listening on {address}", flush=True)
    if settings.metrics_listen is not None:
        print(f"metrics on http://{settings.metrics_listen.rpartition(':')[0]}:{metrics_port}/metrics", flush=True)
    if settings.port_file is not None:
        # By rename, so that whoever waits for the file never reads half of it.
        partial = settings.port_file.with_name(settings.port_file.name + ".partial")
        partial.write_text(f"{port}\n")
        partial.replace(settings.port_file)


def _what_is_served(gateway: Gateway, seconds: float) -> dict[str, object]:
    models = gateway.engine.catalog.models({})
    versions = {name: [listed.key.version for listed in found if listed.version] for name, found in models.items()}
    return {"models": versions, "startup_s": round(seconds, 2)}


async def _reload_forever(authenticator: Authenticator) -> None:
    while True:
        await asyncio.sleep(_RELOAD_EVERY_S)
        authenticator.reload()


def _authenticator(settings: Settings) -> Authenticator:
    return Anyone() if settings.token_file is None else TokenFile(settings.token_file)


def _credentials(settings: Settings) -> grpc.ServerCredentials | None:
    if settings.tls_key is None or settings.tls_cert is None:
        return None
    return Certificates(key=settings.tls_key, chain=settings.tls_cert, client_ca=settings.tls_client_ca).credentials()


def _secret(settings: Settings) -> bytes:
    if settings.secret_file is None:
        return secrets.token_bytes(_SECRET_BYTES)
    secret = settings.secret_file.read_bytes()
    if len(secret) < _SECRET_BYTES:
        raise SettingsError(f"--secret-file: expected at least {_SECRET_BYTES} bytes; it has {len(secret)}")
    return secret


def _batch_policy(settings: Settings) -> BatchPolicy:
    return BatchPolicy(
        max_batch_size=settings.max_batch_size,
        max_steps_per_turn=settings.max_steps_per_turn,
        executor_timeout=settings.executor_timeout,
        shared_seconds=_SHARED_S,
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        max_chunk_bytes=settings.max_chunk_bytes,
        max_stream_steps=settings.max_stream_steps,
        step_timeout=settings.step_timeout,
        session_ttl=settings.session_ttl,
        max_session_ttl=settings.max_session_ttl,
    )


def _server_options(settings: Settings) -> list[tuple[str, int]]:
    return [
        # Well above the codec's limit, which is the one that clients meet: it can say what is wrong.
        ("grpc.max_receive_message_length", 8 * settings.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        # Two gateways on one port would share its connections at random; the second is refused instead.
        ("grpc.so_reuseport", 0),
        # What a connection took is not all given back, and a process has only so many descriptors.
        ("grpc.max_allowed_incoming_connections", settings.max_connections),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ]
