"""Settings of the model server: from flags, environment variables (``NTM_MODEL_SERVER_...``) and defaults."""

import os
import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

_ADDRESS = re.compile(r"(?P<host>\[[0-9a-fA-F:.]+\]|[^:\s]+):(?P<port>\d{1,5})\Z")
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
_POLICY = re.compile(r"latest(:[1-9]\d{0,3})?\Z|all\Z|specific:\d+(,\d+)*\Z")


class Settings(BaseSettings):
    """TensorFlow Serving's PredictionService and ModelService, served from this process by TensorFlow in Python.

    Every option can also be set as NTM_MODEL_SERVER_<OPTION>, for example NTM_MODEL_SERVER_MODEL_DIR=models.
    """

    model_config = SettingsConfigDict(
        env_prefix="NTM_MODEL_SERVER_",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
        protected_namespaces=(),
    )

    model_dir: Path = Field(
        description="Directory of models: MODEL/VERSION/saved_model.pb. Nothing outside of it is ever loaded.",
    )
    model_config_file: Path | None = Field(
        default=None,
        description="Text file with a ModelServerConfig: which models, versions and labels. Without it every model of "
        "--model-dir is served, and models that appear there later too.",
    )
    version_policy: str = Field(
        default="latest",
        description="Versions served without a config file: 'latest', 'latest:N', 'all' or 'specific:V,V,...'.",
    )
    listen: str = Field(
        default="127.0.0.1:8500",
        description="Address to listen on, HOST:PORT; port 0 takes a free one. It opens once the models are loaded.",
    )
    port_file: Path | None = Field(default=None, description="Writes the port that is listened on to this file.")
    insecure: bool = Field(default=False, description="Allow listening on other addresses than loopback without TLS.")
    tls_cert: Path | None = Field(default=None, description="PEM file with the server's certificate chain.")
    tls_key: Path | None = Field(default=None, description="PEM file with its private key.")
    tls_client_ca: Path | None = Field(
        default=None, description="PEM file with the CAs that clients must have a certificate of (mutual TLS)."
    )

    allow_reload: bool = Field(
        default=False,
        description="Take HandleReloadConfigRequest, within --model-dir. Anyone who can connect may send it.",
    )
    allow_version_labels_for_unavailable_models: bool = Field(
        default=False, description="Let new labels point at versions that are not loaded yet."
    )
    file_system_poll_wait_seconds: float = Field(
        default=1.0, gt=0, description="Seconds between two looks for new versions."
    )
    max_num_load_retries: int = Field(
        default=5, ge=0, description="How often a version that cannot be loaded is tried again."
    )
    load_retry_interval_seconds: float = Field(default=60.0, ge=0, description="Seconds between two such tries.")
    enable_model_warmup: bool = Field(
        default=True, description="Run assets.extra/tf_serving_warmup_requests before a version is served."
    )

    grpc_max_threads: int = Field(
        default=4 * (os.cpu_count() or 1),
        ge=2,
        description="Threads for requests. One waits for the next request, so one call less than this runs at once; "
        "more are refused with RESOURCE_EXHAUSTED.",
    )
    enable_serialization_as_tensor_content: bool = Field(
        default=False, description="Answer with tensor_content instead of typed fields."
    )
    enable_grpc_healthcheck_service: bool = Field(
        default=False, description="Serve grpc.health.v1; it always says SERVING."
    )
    xla_cpu_compilation_enabled: bool = Field(
        default=False, description="Let functions marked jit_compile=True be compiled; without it they fail."
    )
    tensorflow_intra_op_parallelism: int = Field(
        default=1,
        ge=0,
        description="Threads that one operation of a graph may run on; 0 for as many as cores. With one, several "
        "requests side by side are more a second.",
    )
    one_dnn: bool = Field(
        default=False,
        description="Let TensorFlow use oneDNN: sometimes faster, but results then depend a little on the batch size.",
    )
    drain_timeout: float = Field(
        default=10, ge=0, description="Seconds that calls under way get to finish after SIGTERM."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="How much is logged.")

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, value: str) -> str:
        match = _ADDRESS.match(value)
        if match is None or int(match["port"]) > 65535:
            raise ValueError(f"expected HOST:PORT with a port of 0 to 65535, for example 127.0.0.1:8500; got {value!r}")
        return value

    @field_validator("version_policy")
    @classmethod
    def _check_version_policy(cls, value: str) -> str:
        if _POLICY.match(value) is None:
            raise ValueError(f"expected 'latest', 'latest:N', 'all' or 'specific:V,V,...'; got {value!r}")
        return value

    @field_validator("model_dir")
    @classmethod
    def _check_model_dir(cls, value: Path) -> Path:
        if not value.is_dir():
            raise ValueError(f"expected a directory of models; {str(value)!r} is not a directory")
        return value.resolve()

    @model_validator(mode="after")
    def _check_transport(self) -> "Settings":
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("--tls-cert and --tls-key go together; got one of them")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("--tls-client-ca needs --tls-cert and --tls-key")
        host = self.listen.rpartition(":")[0]
        if host not in _LOOPBACK and self.tls_cert is None and not self.insecure:
            raise ValueError(
                f"--listen {self.listen} would be open to everybody who can reach it: give --tls-cert and --tls-key, "
                "or --insecure where the network keeps others out"
            )
        return self
