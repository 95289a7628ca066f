"""What can be done to a session besides stepping it: open, find, copy, look into, end."""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from service.admission import Admission
from service.catalog import Catalog, not_served
from service.errors import CorruptState, InvalidArgument
from service.executors import Executor
from service.seal import Snapshot
from service.sessions import Session, SessionInfo, SessionStore, SessionSummary
from service.types import FloatArray, ModelVersion, SessionKey, StepBatch, VersionKey


class InspectedState(NamedTuple):
    """A session and its state by component name, each in its own shape."""

    session: Session
    components: dict[str, FloatArray]


class SessionAdmin:
    """Opens sessions, of models and of other sessions; tells of them; ends them.

    New ones take the most sessions that their owner may have as ``owner_limit``; None for as many as the store keeps.

    Args:
        store: Keeps the sessions.
        catalog: The models that are served.
        executor: Knows the models' initial states.
        admission: Whether anything new is taken on.
    """

    def __init__(self, *, store: SessionStore, catalog: Catalog, executor: Executor, admission: Admission) -> None:
        self._store = store
        self._catalog = catalog
        self._executor = executor
        self._admission = admission
        self._initial_states: dict[tuple[VersionKey, str], FloatArray] = {}

    async def create(
        self, key: SessionKey, model: str, version: int | None, ttl: float, *, owner_limit: int | None = None
    ) -> Session:
        """Opens a session; the same create again returns the session that is there.

        Raises:
            ModelNotFound, SessionExists, SessionLimit, Draining, StoreUnavailable: see docs/api.md.
        """
        self._admission.check_open()
        served = self._catalog.resolve(model, version)
        return await self._store.create(
            SessionInfo(
                key=key,
                version=served.key,
                fingerprint=served.fingerprint,
                ttl=ttl,
                create_digest=_digest("create", model, version, ttl),
                created=0.0,
            ),
            owner_limit=owner_limit,
        )

    async def get(self, key: SessionKey) -> Session:
        """The session as of its last commit."""
        return await self._store.load(key, fresh=True)

    async def list(self, principal: str, after: str, limit: int) -> Sequence[SessionSummary]:
        """One owner's sessions by id: up to ``limit`` of those after ``after``."""
        return await self._store.list_sessions(principal, after=after, limit=limit)

    async def fork(
        self,
        source: SessionKey,
        fork_id: str,
        ttl: float,
        may_use: Callable[[str], bool],
        *,
        owner_limit: int | None = None,
    ) -> Session:
        """A new session of the same owner that goes on where ``source`` stands. Nothing to replay in it yet.

        Raises:
            ModelNotFound: the owner may not use the model any more.
            SessionNotFound, SessionExists, SessionLimit, Draining, StoreUnavailable: see docs/api.md.
        """
        self._admission.check_open()
        session = await self.get(source)
        if not may_use(session.info.version.model):
            raise not_served(session.info.version.model)
        info = SessionInfo(
            key=SessionKey(source.principal, fork_id),
            version=session.info.version,
            fingerprint=session.info.fingerprint,
            ttl=ttl,
            create_digest=_digest("fork", source.session_id, ttl),
            created=0.0,
        )
        return await self._store.create(info, state=session.state, position=session.position, owner_limit=owner_limit)

    async def snapshot(self, key: SessionKey) -> tuple[Session, Snapshot]:
        """The session as of its last commit, and what a new one can be made of."""
        session = await self.get(key)
        info = session.info
        return session, Snapshot(info.version, info.fingerprint, session.position, session.state)

    async def restore(
        self,
        key: SessionKey,
        snapshot: Snapshot,
        ttl: float,
        may_use: Callable[[str], bool],
        *,
        owner_limit: int | None = None,
    ) -> Session:
        """A new session out of a snapshot, on a served version that is the same model.

        Raises:
            FingerprintMismatch: no version with the snapshot's fingerprint is served (to this caller).
            SessionExists, SessionLimit, Draining, StoreUnavailable: see docs/api.md.
        """
        self._admission.check_open()
        version = self._catalog.with_fingerprint(snapshot.fingerprint, snapshot.version, may_use)
        if snapshot.state is not None and snapshot.state.shape != (version.state_size,):
            raise InvalidArgument(
                f"the snapshot's state has {snapshot.state.size} values; model {version.key} has {version.state_size}",
                field="snapshot",
            )
        state_digest = b"" if snapshot.state is None else hashlib.sha256(snapshot.state.tobytes()).digest()
        info = SessionInfo(
            key=key,
            version=version.key,
            fingerprint=version.fingerprint,
            ttl=ttl,
            create_digest=_digest("restore", snapshot.fingerprint, snapshot.position, state_digest, ttl),
            created=0.0,
        )
        return await self._store.create(info, state=snapshot.state, position=snapshot.position, owner_limit=owner_limit)

    async def delete(self, key: SessionKey) -> None:
        """Ends a session. A step of it that is running will find it gone."""
        await self._store.delete(key)

    async def inspect(self, key: SessionKey) -> InspectedState:
        """The session's state by component, as of its last commit.

        Raises:
            SessionNotFound, ModelVersionUnavailable, FingerprintMismatch, CorruptState: see docs/api.md.
        """
        session = await self.get(key)
        version = await self._catalog.pinned_or_new(session.info)
        state = await self._initial_state(version) if session.state is None else session.state
        if state.shape != (version.state_size,):
            raise CorruptState(f"the stored state has shape {state.shape}; expected ({version.state_size},)")
        components = {
            part.name: state[part.offset : part.offset + int(np.prod(part.shape))].reshape(part.shape)
            for part in version.state_layout
        }
        return InspectedState(session, components)

    async def _initial_state(self, version: ModelVersion) -> FloatArray:
        """``[state_size]``: what a reset row that steps nothing comes back as. The same for every session."""
        name = (version.key, version.fingerprint)
        if name not in self._initial_states:
            rows, steps = self._executor.bucket(1, 1)
            nothing = StepBatch(
                inputs=np.zeros((rows, steps, version.input_dim), np.float32),
                lengths=np.zeros(rows, np.int32),
                reset=np.ones(rows, np.bool_),
                state=np.zeros((rows, version.state_size), np.float32),
            )
            result = await self._executor.step(version.key, nothing)
            self._initial_states[name] = result.state[0].copy()
        return self._initial_states[name]


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
