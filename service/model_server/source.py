"""Finds versions on disk: which directories a configuration aspires to, looked at again and again."""

import logging
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tensorflow_serving.config import model_server_config_pb2 as config_pb2
from tensorflow_serving.config.file_system_storage_path_source_pb2 import FileSystemStoragePathSourceConfig

_log = logging.getLogger(__name__)
_VERSION = re.compile(r"[+-]?\d{1,19}\Z")
PLATFORM = "tensorflow"


def version_policy(text: str) -> Any:
    """A ``ServableVersionPolicy`` from ``latest``, ``latest:N``, ``all`` or ``specific:V,V``."""
    policy = FileSystemStoragePathSourceConfig.ServableVersionPolicy()
    kind, _, argument = text.partition(":")
    if kind == "latest":
        policy.latest.num_versions = int(argument or 1)
    elif kind == "all":
        policy.all.SetInParent()
    else:
        policy.specific.versions.extend(int(version) for version in argument.split(","))
    return policy


def discover(model_dir: Path, policy: Any) -> Any:
    """A ``ModelServerConfig`` of every model in a directory that has a version."""
    config = config_pb2.ModelServerConfig()
    config.model_config_list.SetInParent()
    for path in sorted(model_dir.iterdir()):
        if path.is_dir() and any((version / "saved_model.pb").is_file() for version in _versions(path).values()):
            config.model_config_list.config.add(
                name=path.name, base_path=str(path), model_platform=PLATFORM, model_version_policy=policy
            )
    return config


def aspired(base_path: Path, policy: Any) -> dict[int, Path]:
    """The versions that a policy picks from a model's directory.

    Raises:
        OSError: the directory cannot be read.
    """
    versions = _versions(base_path)
    choice = policy.WhichOneof("policy_choice")
    if choice == "all":
        return versions
    if choice == "specific":
        return {number: versions[number] for number in policy.specific.versions if number in versions}
    newest = sorted(versions, reverse=True)[: max(policy.latest.num_versions, 1)]
    return {number: versions[number] for number in newest}


def _versions(base_path: Path) -> dict[int, Path]:
    return {int(path.name): path for path in base_path.iterdir() if _VERSION.match(path.name)}


class DirectorySource:
    """Looks at the directories of the configured models every so often, and says what is aspired to.

    Args:
        aspire: Takes a model's name and its versions' directories; an empty mapping unloads it.
        interval: Seconds between two looks.
    """

    def __init__(self, aspire: Callable[[str, Mapping[int, Path]], None], *, interval: float) -> None:
        self._aspire = aspire
        self._interval = interval
        self._lock = threading.Lock()
        self._models: dict[str, Any] = {}
        self._discover: Callable[[], Any] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="model-directory", daemon=True)

    def names(self) -> set[str]:
        """The configured models."""
        with self._lock:
            return set(self._models)

    def update(self, models: Iterable[Any]) -> None:
        """Takes over a new list of ``ModelConfig``, and finds no others by itself any more.

        Models that are no longer in it go at once; what is new in it is found by the next look, as in TensorFlow
        Serving.
        """
        with self._lock:
            self._discover = None
            wanted = {model.name: model for model in models}
            for name in self._models.keys() - wanted.keys():
                self._aspire(name, {})
            self._models = wanted

    def start(self, discover: Callable[[], Any] | None = None) -> None:
        """Begins to look; ``discover`` returns a ``ModelServerConfig`` with models that may be new."""
        self._discover = discover
        self._thread.start()

    def close(self) -> None:
        """Ends looking."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._discover is not None:
                    self._models = {m.name: m for m in self._discover().model_config_list.config} | self._models
                for name, model in self._models.items():
                    self._look(name, model)
            if self._stop.wait(self._interval):
                return

    def _look(self, name: str, model: Any) -> None:
        try:
            versions = aspired(Path(model.base_path), model.model_version_policy)
        except OSError as error:
            # What is loaded stays: a file system that is away for a moment must not take the models with it.
            _log.error("cannot read the directory of model %s: %s", name, error)
            return
        if not versions:
            _log.warning("model %s has no version to serve under %s", name, model.base_path)
        self._aspire(name, versions)
