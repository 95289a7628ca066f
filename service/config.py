"""Settings: flags, environment variables (``NTM_...``), a TOML file and defaults, checked before anything starts."""

import argparse
import os
import re
import tomllib
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
    TomlConfigSettingsSource,
)

__all__ = ["Settings", "SettingsError", "read_settings", "shown"]

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\s]+):(?P<port>\d{1,5})\Z")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
# The user and password of a store's URL, down to the last @ before its host.
_PASSWORD = re.compile(r"(://)[^/]*@")

_MIB = 1024 * 1024
# The file that the settings which are being read come from; empty for none.
_file: ContextVar[str] = ContextVar("file", default="")


class Settings(BaseSettings):
    """Stateful batched sequence inference over gRPC.

    Serves every model of a directory from this process (--model-dir), or models of a TensorFlow Serving
    (--tf-serving). Every option can also be set as NTM_<OPTION>, for example NTM_MODEL_DIR=models, or in a TOML file
    (--config). A flag wins over the environment, and that over the file.
    """

    model_config = SettingsConfigDict(
        env_prefix="NTM_", cli_kebab_case=True, cli_implicit_flags=True, cli_hide_none_type=True, extra="forbid"
    )

    check: bool = Field(default=False, description="Print the settings that it would run with, and exit.")
    config: Path | None = Field(
        default=None, description="TOML file of settings, by their names with underscores: max_batch_size = 64."
    )
    model_dir: Path | None = Field(
        default=None,
        description="Directory of models: MODEL/VERSION/saved_model.pb, as `python training/train.py` exports them.",
    )
    tf_serving: str | None = Field(
        default=None,
        description="TensorFlow Serving to run the models on, HOST:PORT or dns:///HOST:PORT (all its replicas).",
    )
    tf_serving_ca: Path | None = Field(
        default=None, description="PEM of the authority of TensorFlow Serving's certificate; with it, TLS is spoken."
    )
    tf_serving_key: Path | None = Field(
        default=None, description="PEM private key for a TensorFlow Serving that asks for client certificates."
    )
    tf_serving_cert: Path | None = Field(default=None, description="PEM certificate chain that belongs to it.")
    model: list[str] = Field(default=[], description="With --tf-serving: names of the models to serve; repeatable.")
    store: str = Field(
        default="memory",
        description="Where sessions are kept: 'memory' loses them with this process; redis://HOST:PORT/DB keeps them "
        "in a Valkey or Redis that any number of gateways share.",
    )
    listen: str = Field(
        default="127.0.0.1:50051",
        description="Address to listen on, HOST:PORT; port 0 takes a free one. Anything but loopback needs --insecure, "
        "since it would be open to everybody who can reach it.",
    )
    port_file: Path | None = Field(
        default=None, description="Writes the port that is listened on to this file, for scripts that use port 0."
    )
    metrics_listen: str | None = Field(
        default=None,
        description="Address on which Prometheus finds the gateway's metrics, HOST:PORT, path /metrics, in plain HTTP; "
        "left out, nothing is counted. They name models and no client; keep the port to those who watch the gateway.",
    )
    health_listen: str | None = Field(
        default=None,
        description="Address on which grpc.health.v1, and nothing else, is answered too, HOST:PORT, never with TLS: "
        "the probes of Kubernetes speak none. It tells whoever reaches it whether this gateway serves, no more.",
    )
    tracing: bool = Field(
        default=False,
        description="Send OpenTelemetry traces over OTLP, to where the standard OTEL_... environment says (extra "
        "'tracing').",
    )
    tls_key: Path | None = Field(default=None, description="PEM private key; with --tls-cert, the port speaks TLS.")
    tls_cert: Path | None = Field(
        default=None, description="PEM certificate chain. Key and certificates are read anew when the files change."
    )
    tls_client_ca: Path | None = Field(
        default=None, description="PEM of the authority whose client certificates are asked for (mTLS)."
    )
    token_file: Path | None = Field(
        default=None,
        description="TOML file of principals and their tokens' hashes (docs/operations.md); read anew when it changes.",
    )
    secret_file: Path | None = Field(
        default=None,
        description="File of at least 32 random bytes, shared by all gateways, which authenticates snapshots and page "
        "tokens. Left out: a new one for each process, so that no other one takes its snapshots.",
    )
    insecure: bool = Field(
        default=False, description="Allow listening on other addresses than loopback without TLS and tokens."
    )

    max_batch_size: int = Field(
        default=256,
        ge=1,
        le=4096,
        description="The most sessions stepped in one batch; models in this process take 64 at a time at the most.",
    )
    max_steps_per_turn: int = Field(
        default=16,
        ge=1,
        le=1024,
        description="The most time steps of one chunk run in one batch; longer chunks take several turns.",
    )
    xla: bool = Field(default=True, description="Compile the models in the background (serves uncompiled until then).")

    max_connections: int = Field(
        default=1000, ge=1, description="The most connections of clients; another one is closed as soon as it is made."
    )
    max_sessions: int = Field(default=100_000, ge=1, description="The most sessions kept.")
    max_queued_steps: int = Field(default=10_000, ge=1, description="The most steps taken on and not yet answered.")
    max_queued_mib: float = Field(default=256, gt=0, description="The most MiB of inputs that these hold together.")
    store_durability: str = Field(
        default="server",
        description="What a commit waits for: 'server' trusts the store's own settings; 'aof' its fsync; 'replicas=N' "
        "N replicas; 'aof,replicas=N' both (docs/durability.md).",
    )
    store_timeout: float = Field(default=2.0, gt=0, description="Time limit of one command to the store, in seconds.")
    store_cache_mib: float = Field(default=256, ge=0, description="MiB of sessions of the store that are kept here.")
    store_prefix: str = Field(default="ntm:", description="What the names of the store's keys begin with.")
    store_format: int = Field(
        default=1, ge=1, description="Form in which sessions are written: the newest that every gateway reads."
    )

    max_stream_steps: int = Field(
        default=1024, ge=1, description="Steps under way in one stream past which no more of it is read."
    )
    max_message_mib: float = Field(default=16, gt=0, le=512, description="The largest message taken, in MiB.")
    max_chunk_mib: float = Field(default=4, gt=0, le=512, description="The largest inputs of one step, in MiB.")

    session_ttl: float = Field(
        default=3600, gt=0, description="Seconds that a session lives past its last step, unless it asks otherwise."
    )
    max_session_ttl: float = Field(default=7 * 24 * 3600, gt=0, description="The most that it may ask for, in seconds.")
    step_timeout: float = Field(
        default=60, gt=0, description="Time limit of a step that has none of its own, in seconds."
    )
    executor_timeout: float = Field(default=30, gt=0, description="Time limit of one batch, in seconds.")
    idle_poll: float = Field(
        default=0.001,
        ge=0,
        le=1,
        description="Seconds for which the event loop looks for a caller's next step before it sleeps, where the last "
        "one came that soon and was alone; models in the process only.",
    )
    drain_timeout: float = Field(
        default=25, ge=0, description="Seconds that steps under way get to finish after SIGTERM."
    )

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="How much is logged.")
    log_sample: float = Field(
        default=1.0, ge=0, le=1, description="Share of the requests that get a line in the log, at level debug."
    )
    log_format: Literal["auto", "console", "json"] = Field(
        default="auto", description="'auto' is 'console' on a terminal and 'json' elsewhere."
    )

    @field_validator("listen", "metrics_listen", "health_listen")
    @classmethod
    def _check_listen(cls, value: str | None) -> str | None:
        if value is None:
            return value
        match = _ADDRESS.match(value)
        if match is None or int(match["port"]) > 65535:
            raise ValueError(
                f"expected HOST:PORT with a port of 0 to 65535, for example 127.0.0.1:50051; got {value!r}"
            )
        return value

    @field_validator("model_dir")
    @classmethod
    def _check_model_dir(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_dir():
            raise ValueError(f"expected a directory of models; {str(value)!r} is not a directory")
        return value

    @field_validator("store")
    @classmethod
    def _check_store(cls, value: str) -> str:
        if value != "memory" and not value.startswith(
            ("redis://", "rediss://", "unix://", "redis+sentinel://", "rediss+sentinel://")
        ):
            raise ValueError(f"expected 'memory' or redis://HOST:PORT/DB; got {value!r}")
        return value

    @field_validator(
        "tls_key",
        "tls_cert",
        "tls_client_ca",
        "tf_serving_ca",
        "tf_serving_key",
        "tf_serving_cert",
        "token_file",
        "secret_file",
    )
    @classmethod
    def _check_file(cls, value: Path | None) -> Path | None:
        if value is not None and not value.is_file():
            raise ValueError(f"expected a file; {str(value)!r} is not one")
        return value

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if (self.model_dir is None) == (self.tf_serving is None):
            raise ValueError("expected one of --model-dir and --tf-serving: where the models are")
        if self.tf_serving is not None and not self.model:
            raise ValueError("--tf-serving needs --model: TensorFlow Serving cannot be asked which models it has")
        if (self.tls_key is None) != (self.tls_cert is None):
            raise ValueError("--tls-key and --tls-cert go together")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-key and --tls-cert")
        if (self.tf_serving_key is None) != (self.tf_serving_cert is None):
            raise ValueError("--tf-serving-key and --tf-serving-cert go together")
        if self.tf_serving_cert is not None and self.tf_serving_ca is None:
            raise ValueError("--tf-serving-cert needs --tf-serving-ca: a certificate is shown to those who are trusted")
        guarded = self.tls_cert is not None and (self.token_file is not None or self.tls_client_ca is not None)
        if self.listen_host not in _LOOPBACK and not guarded and not self.insecure:
            raise ValueError(
                f"--listen {self.listen} is open to everybody who can reach it: expected --tls-key and --tls-cert with "
                "--token-file or --tls-client-ca; or listen on 127.0.0.1, or say --insecure"
            )
        if self.session_ttl > self.max_session_ttl:
            raise ValueError(f"--session-ttl {self.session_ttl} is above --max-session-ttl {self.max_session_ttl}")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        path = _file.get() or os.environ.get("NTM_CONFIG")
        return init_settings, env_settings, *([TomlConfigSettingsSource(settings_cls, Path(path))] if path else [])

    @property
    def listen_host(self) -> str:
        """The host part of ``listen``."""
        return self.listen.rpartition(":")[0]

    @property
    def max_message_bytes(self) -> int:
        """The codec's limit. The transport's is above it, so that the codec can say what is wrong."""
        return int(self.max_message_mib * _MIB)

    @property
    def max_chunk_bytes(self) -> int:
        """The limit of one step's inputs."""
        return int(self.max_chunk_mib * _MIB)

    @property
    def max_queued_bytes(self) -> int:
        """The limit of the inputs under way."""
        return int(self.max_queued_mib * _MIB)


def shown(settings: Settings) -> str:
    """The settings as JSON, to be read by people: without passwords."""
    safe = settings.model_copy(update={"store": _PASSWORD.sub(r"\1***@", settings.store)})
    return safe.model_dump_json(indent=2, exclude={"check", "config"})


def read_settings(argv: Sequence[str] | None = None) -> Settings:
    """The settings of this process.

    Args:
        argv: Command-line arguments; None for the process's own.

    Raises:
        SettingsError: the text has a line for each field that is wrong.
    """
    path = _config_file(argv)
    if path and not Path(path).is_file():
        raise SettingsError(f"--config or NTM_CONFIG: {path!r} is not a file")
    token = _file.set(path)
    source: CliSettingsSource[Settings] = CliSettingsSource(Settings, cli_prog_name="ntm-serve")
    try:
        return CliApp.run(Settings, cli_args=list(argv) if argv is not None else None, cli_settings_source=source)
    except ValidationError as error:
        raise SettingsError("; ".join(_line(details) for details in error.errors())) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"--config: {path!r} is not TOML: {error}") from None
    finally:
        _file.reset(token)


def _config_file(argv: Sequence[str] | None) -> str:
    """The file that is named by flag or environment; it has to be read before the flags, which win over it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get("NTM_CONFIG", ""))
    return str(parser.parse_known_args(argv)[0].config)


def _line(details: ErrorDetails) -> str:
    message = details["msg"].removeprefix("Value error, ")
    name = "".join(f"--{part}" for part in details["loc"][:1] if isinstance(part, str)).replace("_", "-")
    return f"{name}: {message}" if name else message
