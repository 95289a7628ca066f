"""The catalog: which model versions are served, and which of them a session is pinned to."""

from collections.abc import Callable, Mapping

from service.errors import ExecutorUnavailable, FingerprintMismatch, ModelNotFound, ModelVersionUnavailable
from service.executors import Executor
from service.sessions import SessionInfo
from service.types import ModelVersion, VersionKey


class Catalog:
    """Names to versions. It asks the executor anew each time, so it is never out of date."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._open = False

    def open(self) -> None:
        """The executor has its models: what it does not have from now on is not there."""
        self._open = True

    def models(self) -> dict[str, list[ModelVersion]]:
        """Every model by name, its versions newest first.

        Raises:
            ExecutorUnavailable: they are still being loaded.
        """
        models: dict[str, list[ModelVersion]] = {}
        versions = self._versions()
        for key in sorted(versions, key=lambda key: (key.model, -key.version)):
            models.setdefault(key.model, []).append(versions[key])
        return models

    def model(self, name: str) -> list[ModelVersion]:
        """One model's versions, newest first.

        Raises:
            ModelNotFound: it is not served.
        """
        versions = self.models().get(name)
        if versions is None:
            raise not_served(name)
        return versions

    def resolve(self, name: str, version: int | None) -> ModelVersion:
        """The version that a new session gets: the one it asks for, or the newest.

        Raises:
            ModelNotFound: no such model, or no such version.
        """
        versions = self.model(name)
        if version is None:
            return versions[0]
        for candidate in versions:
            if candidate.key.version == version:
                return candidate
        served = ", ".join(str(candidate.key.version) for candidate in versions)
        raise ModelNotFound(f"model {name!r} has no version {version}; served: {served}", model=name, version=version)

    def pinned(self, session: SessionInfo) -> ModelVersion:
        """The version that a session was opened with.

        Raises:
            ModelVersionUnavailable: it is served no more.
            FingerprintMismatch: its number is, but stands for another model.
        """
        version = self._versions().get(session.version)
        if version is None:
            raise ModelVersionUnavailable(
                f"model version {session.version}, which the session was opened with, is not served",
                model=session.version.model,
                version=session.version.version,
            )
        if version.fingerprint != session.fingerprint:
            raise FingerprintMismatch(
                f"model version {session.version} is not the model that the session was opened with",
                expected=session.fingerprint,
                served=version.fingerprint,
            )
        return version

    def with_fingerprint(self, fingerprint: str, preferred: VersionKey, may_use: Callable[[str], bool]) -> ModelVersion:
        """A served version of one fingerprint that ``may_use`` lets through; ``preferred`` where it is one of them.

        Raises:
            FingerprintMismatch: there is none.
        """
        same = [v for v in self._versions().values() if v.fingerprint == fingerprint and may_use(v.key.model)]
        if not same:
            raise FingerprintMismatch(
                f"no version that is served is the model of {preferred} that the snapshot was taken of",
                expected=fingerprint,
            )
        return max(same, key=lambda version: (version.key == preferred, version.key.version, version.key.model))

    def _versions(self) -> Mapping[VersionKey, ModelVersion]:
        if not self._open:
            raise ExecutorUnavailable("the models are still being loaded")
        return self._executor.versions()


def not_served(name: str) -> ModelNotFound:
    """What a caller is told of a model that is not there, or not for it: the two cannot be told apart."""
    return ModelNotFound(f"no model {name!r} is served", model=name)
