"""The configuration of the server, and the way from a ModelSpec to a loaded version.

Follows TensorFlow Serving's ServerCore: the order of its checks, and what it waits for.
"""

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import grpc

from service.model_server.errors import ServingError, failed_precondition, invalid_argument
from service.model_server.manager import Handle, LoadPolicy, ModelManager
from service.model_server.saved_model import SavedModel
from service.model_server.source import PLATFORM, DirectorySource
from service.model_server.states import State, StateMonitor
from service.model_server.warmup import warm_up

_TENSORFLOW_MODEL_TYPE = 1


class ServerCore:
    """What is configured and loaded.

    Args:
        model_dir: Nothing outside of it is loaded.
        poll_interval: Seconds between two looks for new versions.
        load_policy: What happens when a load fails.
        labels_for_unavailable: Whether a new label may point at a version that is not loaded.
        warmup: Whether warmup requests beside a model are run before it is served.
        intra_op_threads: Threads that one operation may run on; 0 for one a core.
    """

    def __init__(
        self,
        model_dir: Path,
        *,
        poll_interval: float,
        load_policy: LoadPolicy,
        labels_for_unavailable: bool = False,
        warmup: bool = True,
        intra_op_threads: int = 1,
    ) -> None:
        self._model_dir = model_dir.resolve()
        self._labels_for_unavailable = labels_for_unavailable
        self._warmup = warmup
        self._intra_op_threads = intra_op_threads
        self._reloading = threading.Lock()
        self._platforms: dict[str, str] = {}
        self._labels: dict[str, dict[str, int]] = {}
        self._closed = False
        self.monitor = StateMonitor()
        self.manager = ModelManager(self._load, monitor=self.monitor, policy=load_policy)
        self._source = DirectorySource(self.manager.aspire, interval=poll_interval)

    def start(self, config: Any, discover: Callable[[], Any] | None = None) -> None:
        """Loads the first configuration and waits for its models.

        Args:
            config: A ``ModelServerConfig``.
            discover: Returns one with models that appeared since; used until the first reload.

        Raises:
            ServingError: what is wrong with it, or which models could not be loaded.
        """
        self._configure(config.model_config_list.config)
        self._source.update(config.model_config_list.config)
        names = self._source.names()
        self._source.start(discover)
        self._await_models(names, since=0, noun="servable(s)")

    def reload(self, config: Any) -> None:
        """Replaces the configuration; waits for models that were not in the old one, however long that takes.

        Raises:
            ServingError: what is wrong with it, or which of the new models could not be loaded.
        """
        if config.WhichOneof("config") != "model_config_list":
            raise invalid_argument(
                "ServerModelConfig type not supported by HandleReloadConfigRequest. "
                "Only ModelConfigList is currently supported"
            )
        with self._reloading:
            if self._closed:
                raise ServingError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            self._configure(config.model_config_list.config)
            since = self.monitor.sequence()
            new = {model.name for model in config.model_config_list.config} - self._source.names()
            self._source.update(config.model_config_list.config)
            self._await_models(new, since=since, noun="model(s)")

    @contextlib.contextmanager
    def use(self, model_spec: Any) -> Iterator[Handle[SavedModel]]:
        """Holds the version that a ``ModelSpec`` asks for.

        Raises:
            ServingError: it has no name, its label is not known, or no such version is available.
        """
        if not model_spec.name:
            raise invalid_argument("ModelSpec has no name specified.")
        choice = model_spec.WhichOneof("version_choice")
        version: int | None = None
        if choice == "version":
            version = model_spec.version.value
        elif choice == "version_label":
            version = self._labels.get(model_spec.name, {}).get(model_spec.version_label)
            if version is None:
                raise invalid_argument(f"Unrecognized servable version label: {model_spec.version_label}")
        with self.manager.use(model_spec.name, version) as handle:
            yield handle

    def close(self, timeout: float = 5.0) -> None:
        """Ends all waiting and frees what is loaded. A reload that waits fails."""
        self._closed = True
        self.monitor.close()
        self._source.close()
        self.manager.close(timeout)

    def _load(self, name: str, version: int, path: Path) -> SavedModel:
        servable = SavedModel(path, intra_op_threads=self._intra_op_threads)
        if self._warmup:
            try:
                warm_up(Handle(name, version, servable), path)
            except ServingError:
                servable.close()
                raise
        return servable

    def _configure(self, models: Collection[Any]) -> None:
        """Checks a list of ``ModelConfig`` and takes over its labels, in the order of ServerCore::ReloadConfig."""
        names = set()
        for model in models:
            if model.name in names:
                raise invalid_argument(f"Illegal to list model {model.name} multiple times in config list")
            names.add(model.name)
        for model in models:
            if not (model.base_path.startswith("/") or "://" in model.base_path):
                raise invalid_argument(
                    f"Expected model {model.name} to have an absolute path or URI; got base_path()={model.base_path}"
                )
        for model in models:
            self._check_inside(model)
            if model.name in self._platforms and (platform := _platform(model)) != self._platforms[model.name]:
                raise invalid_argument(
                    f"Illegal to change a model's platform. For model {model.name} platform was "
                    f"{self._platforms[model.name]} and new platform requested is {platform}"
                )
        labels = self._checked_labels(models)
        platforms = {model.name: _platform(model) for model in models}
        for name, platform in platforms.items():
            if platform != PLATFORM:
                raise invalid_argument(f"Model {name} requests unsupported platform {platform}")
        self._labels, self._platforms = labels, platforms

    def _check_inside(self, model: Any) -> None:
        path = Path(model.base_path).resolve()
        if "://" in model.base_path or not path.is_relative_to(self._model_dir) or path == self._model_dir:
            raise ServingError(
                grpc.StatusCode.PERMISSION_DENIED,
                f"base_path {model.base_path} of model {model.name} is outside of the server's model directory",
            )

    def _checked_labels(self, models: Collection[Any]) -> dict[str, dict[str, int]]:
        labels: dict[str, dict[str, int]] = {}
        for model in models:
            states = self.monitor.versions(model.name)
            for label, version in model.version_labels.items():
                moves = self._labels.get(model.name, {}).get(label, version) != version
                state = states.get(version)
                available = state is not None and state.state is State.AVAILABLE
                if not available and (moves or not self._labels_for_unavailable):
                    raise failed_precondition(
                        f"Request to assign label to version {version} of model {model.name}, "
                        "which is not currently available for inference"
                    )
                labels.setdefault(model.name, {})[label] = version
        return labels

    def _await_models(self, names: Collection[str], *, since: int, noun: str) -> None:
        reached = self.monitor.wait_available(names, since=since)
        if reached is None:
            raise ServingError(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        failed = {key: state for key, state in reached.items() if state.state is not State.AVAILABLE}
        if failed:
            texts = "".join(
                f"{{{{name: {name} version: {version}}}{f' due to error: {state.error}' if state.error else ''}}}, "
                for (name, version), state in sorted(failed.items())
            )
            raise ServingError(grpc.StatusCode.UNKNOWN, f"{len(failed)} {noun} did not become available: {{{texts}}}")


def _platform(model: Any) -> str:
    if model.model_type:
        if model.model_platform:
            raise invalid_argument(
                "Illegal setting both ModelServerConfig::model_type (deprecated) and ModelServerConfig::model_platform."
            )
        if model.model_type != _TENSORFLOW_MODEL_TYPE:
            raise invalid_argument(f"ModelServerConfig::model_type choice {model.model_type} not supported.")
        return PLATFORM
    if not model.model_platform:
        raise invalid_argument(
            "Illegal setting neither ModelServerConfig::model_type (deprecated) nor ModelServerConfig::model_platform."
        )
    return str(model.model_platform)
