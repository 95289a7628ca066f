"""What the settings name: the executor and the session store, each imported only where it is used."""

import time
from typing import TYPE_CHECKING

import grpc

from service.config import Settings, SettingsError
from service.executors import Executor
from service.sessions import SessionStore

if TYPE_CHECKING:
    from service.tracing import Tracing


def make_executor(settings: Settings) -> Executor:
    """The executor that ``settings`` name; nothing is loaded yet."""
    if settings.tf_serving is not None:
        from service.executors.tf_serving import TfServingExecutor  # the client of another process

        return TfServingExecutor(
            settings.tf_serving,
            models=settings.model,
            credentials=_tf_serving_credentials(settings),
            timeout=settings.executor_timeout,
        )
    from service.executors.embedded import EmbeddedExecutor  # brings TensorFlow

    if settings.model_dir is None:
        raise AssertionError("settings have a model directory or a model server")
    return EmbeddedExecutor(
        settings.model_dir,
        max_batch_size=settings.max_batch_size,
        max_steps=settings.max_steps_per_turn,
        compile=settings.xla,
        idle_poll=settings.idle_poll,
    )


def _tf_serving_credentials(settings: Settings) -> grpc.ChannelCredentials | None:
    if settings.tf_serving_ca is None:
        return None
    files = (settings.tf_serving_ca, settings.tf_serving_key, settings.tf_serving_cert)
    return grpc.ssl_channel_credentials(*(file.read_bytes() if file is not None else None for file in files))


def make_store(settings: Settings) -> SessionStore:
    """The session store that ``settings`` name; nothing is connected yet."""
    if settings.store != "memory":
        from service.sessions.redis import RedisStore  # brings a client library

        return RedisStore(
            settings.store,
            max_sessions=settings.max_sessions,
            prefix=settings.store_prefix,
            durability=settings.store_durability,
            timeout=settings.store_timeout,
            cache_bytes=int(settings.store_cache_mib * 1024 * 1024),
            write_form=settings.store_format,
        )
    from service.sessions.memory import MemoryStore

    return MemoryStore(max_sessions=settings.max_sessions, clock=time.time)


def make_tracing(settings: Settings) -> "Tracing | None":
    """What makes spans, if ``settings`` ask for them.

    Raises:
        SettingsError: OpenTelemetry is not installed.
    """
    if not settings.tracing:
        return None
    try:
        from service.tracing import Tracing, provider_from_environment

        return Tracing(provider_from_environment())
    except ImportError as error:
        raise SettingsError(f"--tracing needs the extra 'tracing': {error}") from None
