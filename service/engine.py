"""The story of one step, top to bottom, and of the few other things that can be done to a session."""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

import numpy as np

from service.admission import Admission
from service.batcher import Batcher
from service.catalog import Catalog, Listed, not_served
from service.errors import (
    CorruptState,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidArgument,
    InvalidTensor,
    ModelVersionUnavailable,
    PositionMismatch,
    ServiceError,
    SessionLimit,
    SessionNotFound,
    StepConflict,
    StoreUnavailable,
)
from service.executors import Executor
from service.express import Express
from service.observing import SILENT, Observer
from service.seal import Snapshot
from service.sessions import (
    Commit,
    Committed,
    LastStep,
    LocalStore,
    Session,
    SessionInfo,
    SessionStore,
    SessionSummary,
    Verdict,
    judge,
)
from service.turns import Turns
from service.types import (
    FloatArray,
    ModelVersion,
    SessionKey,
    StepBatch,
    StepCall,
    StepReply,
    VersionKey,
    VersionState,
)

_log = logging.getLogger(__name__)

# A session outlives the time limit of the step that it is checked out for by this much.
_CHECKOUT_MARGIN_S = 5.0


class InspectedState(NamedTuple):
    """A session and its state by component name, each in its own shape."""

    session: Session
    components: dict[str, FloatArray]


class Engine:
    """Sessions, models and the batcher, joined.

    Args:
        store: Keeps the sessions.
        executor: Runs the models.
        batcher: Batches steps over ``executor``.
        admission: How much is taken on.
        clock: The event loop's clock.
        observer: Hears of every step.
        timer: Seconds, finer than ``clock``: what durations are told by.

    Attributes:
        catalog: The models that are served.
        express: Takes steps that have nothing to wait for but their batch; None where the store has none at hand.
        drained: Set once ``drain`` is through: nothing more will be answered but refusals.
    """

    def __init__(
        self,
        *,
        store: SessionStore,
        executor: Executor,
        batcher: Batcher,
        admission: Admission,
        clock: Callable[[], float],
        observer: Observer = SILENT,
        timer: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.catalog = Catalog(executor)
        self._store = store
        self._executor = executor
        self._batcher = batcher
        self._admission = admission
        self._clock = clock
        self._observer = observer
        self._timer = timer
        self._turns = Turns()
        self.express = self._make_express()
        self.drained = asyncio.Event()
        self._initial_states: dict[tuple[VersionKey, str], FloatArray] = {}
        self._seen: object = None
        self._homeless: set[VersionKey] = set()

    async def start(self) -> None:
        """Loads or finds the models. Until then everything that needs one is refused with ExecutorUnavailable.

        Raises:
            ModelLoadError: there is nothing to serve.
        """
        await self._executor.start()
        self.catalog.open()

    async def step(self, call: StepCall, owner_limit: int | None = None) -> StepReply:
        """Applies one step, exactly once where it says its position.

        Any failure before the commit leaves the session as it was. ``owner_limit`` is the most steps that the
        session's owner may have under way.

        Raises:
            ServiceError: see the table of docs/api.md.
        """
        began = self._timer()
        session: Session | None = None
        with self._admission.permit(call.inputs.nbytes, call.caller, owner_limit):
            try:
                async with asyncio.timeout_at(call.deadline), self._turns.of(call.key):
                    session = await self._store.load(call.key)
                    return await self._apply(call, session, began)
            except TimeoutError:
                expired = DeadlineExceeded(
                    "the step's time limit passed; whether it was applied shows when it is sent again"
                )
                _mark(expired, session)
                raise expired from None
            except ServiceError as error:
                _mark(error, session)
                raise

    async def _apply(self, call: StepCall, session: Session, began: float) -> StepReply:
        """Checked out: replay, or run and commit; once more where the session moved on meanwhile."""
        verdict = judge(session, call.position, call.digest)
        if verdict is not Verdict.RUN:
            # What the caller is told must not come out of a cache.
            session = await self._store.load(call.key, fresh=True)
            verdict = judge(session, call.position, call.digest)
        while verdict is Verdict.RUN:
            try:
                commit = await self._run(call, session)
            except (ModelVersionUnavailable, FingerprintMismatch, InvalidTensor):
                # Neither must this: the session may have been deleted and made anew, on another model.
                stored = await self._store.load(call.key, fresh=True)
                if stored.token == session.token:
                    raise
                session, verdict = stored, judge(stored, call.position, call.digest)
                continue
            committing = self._timer()
            outcome = await self._store.commit(call.key, commit)
            if isinstance(outcome, Committed):
                now = self._timer()
                self._observer.steps_committed(session.info.version, 1, now - began, now - committing)
                return _last(outcome.session).reply
            self._observer.commit_refused(session.info.version, outcome.verdict.value)
            verdict, session = outcome.verdict, outcome.session
        if verdict is Verdict.REPLAY:
            self._observer.step_replayed(session.info.version)
            return _last(session).reply
        raise _refusal(call, session, verdict)

    async def _run(self, call: StepCall, session: Session) -> Commit:
        """Runs the step on a session's state. Nothing is written yet."""
        version = await self.catalog.pinned_or_new(session.info)
        _check_against(version, call, session)
        await self._store.extend(call.key, self._checkout(call.deadline))
        outputs, state = await self._batcher.submit(version, call.inputs, session.state, call.deadline, call.caller)
        return Commit(
            token=session.token,
            position=call.position,
            begin=session.position,
            digest=call.digest,
            state=state,
            reply=StepReply(session.position + len(call.inputs), outputs),
        )

    def _checkout(self, deadline: float) -> float:
        """Seconds for which a session is kept for a step that ends by ``deadline``."""
        return deadline - self._clock() + _CHECKOUT_MARGIN_S

    def _make_express(self) -> Express | None:
        if not isinstance(self._store, LocalStore):
            return None
        return Express(
            store=self._store,
            catalog=self.catalog,
            batcher=self._batcher,
            admission=self._admission,
            turns=self._turns,
            checkout=self._checkout,
            observer=self._observer,
            timer=self._timer,
        )

    async def make_room(self, key: SessionKey, limit: int | None) -> None:
        """Checks that ``key``'s owner, who may keep ``limit`` sessions, may have this one.

        Raises:
            SessionLimit: the owner has as many already, and this is not one of them.
        """
        if limit is None or len(await self._store.list_sessions(key.principal, limit=limit + 1)) < limit:
            return
        try:
            await self._store.load(key, fresh=True)
        except SessionNotFound:
            raise SessionLimit(f"this caller may keep at most {limit} sessions", limit=limit) from None

    async def create(self, key: SessionKey, model: str, version: int | None, ttl: float) -> Session:
        """Opens a session; the same create again returns the session that is there.

        Raises:
            ModelNotFound, SessionExists, SessionLimit, Draining, StoreUnavailable: see docs/api.md.
        """
        self._admission.check_open()
        served = self.catalog.resolve(model, version)
        return await self._store.create(
            SessionInfo(
                key=key,
                version=served.key,
                fingerprint=served.fingerprint,
                ttl=ttl,
                create_digest=_digest("create", model, version, ttl),
                created=0.0,
            )
        )

    async def get(self, key: SessionKey) -> Session:
        """The session as of its last commit."""
        return await self._store.load(key, fresh=True)

    async def list(self, principal: str, after: str, limit: int) -> Sequence[SessionSummary]:
        """One owner's sessions by id: up to ``limit`` of those after ``after``."""
        return await self._store.list_sessions(principal, after=after, limit=limit)

    async def fork(self, source: SessionKey, fork_id: str, ttl: float) -> Session:
        """A new session of the same owner that goes on where ``source`` stands. Nothing to replay in it yet.

        Raises:
            SessionNotFound, SessionExists, SessionLimit, Draining, StoreUnavailable: see docs/api.md.
        """
        self._admission.check_open()
        session = await self.get(source)
        info = SessionInfo(
            key=SessionKey(source.principal, fork_id),
            version=session.info.version,
            fingerprint=session.info.fingerprint,
            ttl=ttl,
            create_digest=_digest("fork", source.session_id, ttl),
            created=0.0,
        )
        return await self._store.create(info, state=session.state, position=session.position)

    async def snapshot(self, key: SessionKey) -> tuple[Session, Snapshot]:
        """The session as of its last commit, and what a new one can be made of."""
        session = await self.get(key)
        info = session.info
        return session, Snapshot(info.version, info.fingerprint, session.position, session.state)

    async def restore(self, key: SessionKey, snapshot: Snapshot, ttl: float, may_use: Callable[[str], bool]) -> Session:
        """A new session out of a snapshot, on a served version that is the same model.

        Raises:
            FingerprintMismatch: no version with the snapshot's fingerprint is served (to this caller).
            SessionExists, SessionLimit, Draining, StoreUnavailable: see docs/api.md.
        """
        self._admission.check_open()
        version = self.catalog.with_fingerprint(snapshot.fingerprint, snapshot.version, may_use)
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
        return await self._store.create(info, state=snapshot.state, position=snapshot.position)

    async def delete(self, key: SessionKey) -> None:
        """Ends a session. A step of it that is running will find it gone."""
        await self._store.delete(key)

    async def inspect(self, key: SessionKey) -> InspectedState:
        """The session's state by component, as of its last commit.

        Raises:
            SessionNotFound, ModelVersionUnavailable, FingerprintMismatch, CorruptState: see docs/api.md.
        """
        session = await self.get(key)
        version = await self.catalog.pinned_or_new(session.info)
        state = await self._initial_state(version) if session.state is None else session.state
        if state.shape != (version.state_size,):
            raise CorruptState(f"the stored state has shape {state.shape}; expected ({version.state_size},)")
        components = {
            part.name: state[part.offset : part.offset + int(np.prod(part.shape))].reshape(part.shape)
            for part in version.state_layout
        }
        return InspectedState(session, components)

    async def session_counts(self) -> dict[VersionKey, int]:
        """Live sessions by version."""
        return await self._store.counts()

    async def models(self) -> dict[str, Sequence[Listed]]:
        """Every model by name, its versions newest first, with their states and live sessions.

        Raises:
            ExecutorUnavailable: they are still being loaded.
        """
        return self.catalog.models(await self._store.counts())

    async def model(self, name: str) -> Sequence[Listed]:
        """One model's versions, newest first.

        Raises:
            ModelNotFound: there is no such model.
        """
        listed = (await self.models()).get(name)
        if listed is None:
            raise not_served(name)
        return listed

    async def sweep_forever(self, every: float) -> NoReturn:
        """Removes expired sessions and versions that are done with, every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every)
            await self._store.sweep()
            with contextlib.suppress(StoreUnavailable):  # there is a next time
                await self.mind_versions()

    async def mind_versions(self) -> None:
        """Lets go of versions that take no new sessions and have none left; tells of sessions whose version is gone."""
        versions, statuses = self._executor.versions(), self._executor.statuses()
        draining = [key for key, status in statuses.items() if status.state is VersionState.DRAINING]
        seen = (frozenset(versions), frozenset(draining))
        if seen == self._seen and not draining:
            return
        self._seen = seen
        for key in self._batcher.queued().keys() - versions.keys():
            self._batcher.forget(key)
        counts = await self._store.counts()
        for key in draining:
            if not counts.get(key):
                await self._executor.release(key)
        homeless = {key for key in counts if key not in versions}
        for key in homeless - self._homeless:
            _log.warning("%d sessions are pinned to %s, which is not served; they are kept", counts[key], key)
        self._homeless = homeless

    async def drain(self, limit: float) -> bool:
        """Takes nothing new and waits for what is under way; returns whether it finished within ``limit`` seconds."""
        self._admission.drain()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit):
                await self._admission.idle()
        self.drained.set()
        return self._admission.steps == 0

    async def close(self) -> None:
        """Ends the batcher and closes executor and store. Drain first."""
        await self._batcher.close()
        await self._executor.close()
        await self._store.close()

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


def _check_against(version: ModelVersion, call: StepCall, session: Session) -> None:
    width = call.inputs.shape[1]
    if width != version.input_dim:
        raise InvalidTensor(
            f"inputs have shape {list(call.inputs.shape)}; model {version.key} takes [time, {version.input_dim}]",
            field="inputs.shape",
        )
    if session.state is not None and session.state.shape != (version.state_size,):
        raise CorruptState(f"the stored state has shape {session.state.shape}; expected ({version.state_size},)")


def _mark(error: ServiceError, session: Session | None) -> None:
    """Notes on an error which model version it happened on."""
    if session is not None:
        error.version = session.info.version


def _last(session: Session) -> LastStep:
    if session.last is None:
        raise AssertionError("a session that was just stepped has a last step")
    return session.last


def _refusal(call: StepCall, session: Session, verdict: Verdict) -> ServiceError:
    last_begin = session.last.begin if session.last else None
    facts = {"position": session.position, "last_begin": "" if last_begin is None else last_begin}
    if verdict is Verdict.CONFLICT:
        return StepConflict(f"other inputs were applied at position {call.position}", **facts)
    return PositionMismatch(
        f"the step begins at {call.position}; the session stands at {session.position}"
        + (f" and its last step began at {last_begin}" if last_begin is not None else ""),
        **facts,
    )


def _digest(*parts: object) -> bytes:
    return hashlib.sha256(repr(parts).encode()).digest()
