"""The catalog: which model versions there are, and which of them a session is pinned to."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from service.errors import ExecutorUnavailable, FingerprintMismatch, ModelNotFound, ModelVersionUnavailable
from service.executors import Executor
from service.sessions import SessionInfo
from service.types import ModelVersion, VersionKey, VersionState, VersionStatus

_GONE = VersionStatus(VersionState.UNAVAILABLE, "not served; its sessions are kept until it is back")
_UNTOLD = VersionStatus(VersionState.AVAILABLE)
# How often a version is looked for that another gateway was the first to see.
_LOOK_EVERY_S = 0.05


class Listed(NamedTuple):
    """A version as the catalog shows it.

    Attributes:
        key: Which version.
        status: Its state.
        version: What it says of itself; None where it cannot be stepped.
        sessions: Live sessions that are pinned to it.
    """

    key: VersionKey
    status: VersionStatus
    version: ModelVersion | None
    sessions: int


class Catalog:
    """Names to versions. It asks the executor anew each time, so it is never out of date.

    Args:
        executor: Has the versions.
        patience: Seconds that a version is waited for which another gateway was the first to see.
    """

    def __init__(self, executor: Executor, *, patience: float = 10.0) -> None:
        self._executor = executor
        self.patience = patience
        self._open = False
        # Versions that sessions were stepped on here, or that were waited for in vain: when gone, they are gone.
        self._met: set[VersionKey] = set()

    def open(self) -> None:
        """The executor has its models: what it does not have from now on is not there."""
        self._open = True

    def models(self, sessions: Mapping[VersionKey, int]) -> dict[str, Sequence[Listed]]:
        """Every model by name, its versions newest first: also those that cannot be stepped.

        Args:
            sessions: Live sessions by version. One that has some is listed even if nothing else knows of it.

        Raises:
            ExecutorUnavailable: they are still being loaded.
        """
        versions = self._versions()
        statuses = self._executor.statuses()
        models: dict[str, list[Listed]] = {}
        for key in sorted({*versions, *statuses, *sessions}, key=lambda key: (key.model, -key.version)):
            version = versions.get(key)
            status = statuses.get(key, _GONE if version is None else _UNTOLD)
            models.setdefault(key.model, []).append(Listed(key, status, version, sessions.get(key, 0)))
        return {**models}

    def served(self) -> Sequence[VersionKey]:
        """The versions that can be stepped.

        Raises:
            ExecutorUnavailable: they are still being loaded.
        """
        return tuple(self._versions())

    def resolve(self, name: str, number: int | None) -> ModelVersion:
        """The version that a new session gets: the one it asks for, or the newest.

        Raises:
            ModelNotFound: no such model, or no such version.
        """
        versions = self._versions()
        newest = self._executor.newest(name)
        if newest is None:
            raise not_served(name)
        key = newest if number is None else VersionKey(name, number)
        version = versions.get(key)
        if version is None or self._is_draining(key):
            served = ", ".join(str(k.version) for k in sorted(versions, reverse=True) if k.model == name)
            what = "has no" if version is None else "takes no new sessions on"
            raise ModelNotFound(
                f"model {name!r} {what} version {key.version}; served: {served}", model=name, version=key.version
            )
        return version

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
        self._met.add(session.version)
        return version

    async def pinned_or_new(self, session: SessionInfo) -> ModelVersion:
        """``pinned``, where other gateways share the sessions.

        While a version is rolled out, one of them sees it first, opens a session on it, and the session's next step
        comes here. So a version that is newer than all that are served is waited for, once.

        Raises:
            ModelVersionUnavailable, FingerprintMismatch: as ``pinned``.
        """
        key = session.version
        if key in self._met or key in self._versions() or not self._is_newer(key):
            return self.pinned(session)
        for _ in range(round(self.patience / _LOOK_EVERY_S)):
            if key in self._versions():
                break
            await asyncio.sleep(_LOOK_EVERY_S)
        self._met.add(key)
        return self.pinned(session)

    def _is_newer(self, key: VersionKey) -> bool:
        served = [known.version for known in self._versions() if known.model == key.model]
        return bool(served) and key.version > max(served)

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

        def fitness(version: ModelVersion) -> tuple[bool, bool, int, str]:
            key = version.key
            return not self._is_draining(key), key == preferred, key.version, key.model

        return max(same, key=fitness)

    def _is_draining(self, key: VersionKey) -> bool:
        status = self._executor.statuses().get(key)
        return status is not None and status.state is VersionState.DRAINING

    def _versions(self) -> Mapping[VersionKey, ModelVersion]:
        if not self._open:
            raise ExecutorUnavailable("the models are still being loaded")
        return self._executor.versions()


def not_served(name: str) -> ModelNotFound:
    """What a caller is told of a model that is not there, or not for it: the two cannot be told apart."""
    return ModelNotFound(f"no model {name!r} is served", model=name)
