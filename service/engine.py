"""The story of one step, top to bottom, and of the gateway around it: models, start, drain, end."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import NoReturn

from service.admission import Admission
from service.batcher import Batcher
from service.catalog import Catalog, Listed, not_served
from service.errors import (
    CorruptState,
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidTensor,
    ModelVersionUnavailable,
    PositionMismatch,
    ServiceError,
    StepConflict,
    StoreUnavailable,
)
from service.executors import Executor
from service.express import Express, Parts
from service.observing import SILENT, Observer
from service.session_admin import SessionAdmin
from service.sessions import (
    Commit,
    Committed,
    LastStep,
    LocalStore,
    Session,
    SessionStore,
    Verdict,
    judge,
)
from service.single import Singles
from service.turns import Turns
from service.types import (
    ModelVersion,
    StepCall,
    StepReply,
    VersionKey,
    VersionState,
)

_log = logging.getLogger(__name__)

# A session outlives the time limit of the step that it is checked out for by this much.
_CHECKOUT_MARGIN_S = 5.0


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
        clock: As it was given: what deadlines are told on.
        sessions: Opens and ends sessions, and whatever is done to them besides stepping.
        express: Takes steps that have nothing to wait for but their batch; None where the store has none at hand.
        singles: The same of steps that come one by one.
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
        self.clock = clock
        self._observer = observer
        self._timer = timer
        self.sessions = SessionAdmin(store=store, catalog=self.catalog, executor=executor, admission=admission)
        self._turns = Turns()
        self.express, self.singles = self._make_ways()
        self.drained = asyncio.Event()
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
        outputs, state = await self._batcher.submit(
            version, call.inputs, session.state, call.deadline, call.caller, source=call.key
        )
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
        return deadline - self.clock() + _CHECKOUT_MARGIN_S

    def _make_ways(self) -> tuple[Express | None, Singles | None]:
        if not isinstance(self._store, LocalStore):
            return None, None
        parts = Parts(
            store=self._store,
            catalog=self.catalog,
            batcher=self._batcher,
            admission=self._admission,
            turns=self._turns,
            checkout=self._checkout,
            observer=self._observer,
            timer=self._timer,
        )
        return Express(parts), Singles(parts)

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
