"""The story of one step, top to bottom, and of the few other things that can be done to a session."""

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np

from service.admission import Admission
from service.batcher import Batcher
from service.catalog import Catalog
from service.errors import CorruptState, DeadlineExceeded, InvalidTensor, PositionMismatch, ServiceError, StepConflict
from service.executors import Executor
from service.sessions import Commit, Committed, LastStep, Session, SessionInfo, SessionStore, Verdict, judge
from service.turns import Turns
from service.types import FloatArray, ModelVersion, SessionKey, StepBatch, StepCall, StepReply, VersionKey

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

    Attributes:
        catalog: The models that are served.
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
    ) -> None:
        self.catalog = Catalog(executor)
        self._store = store
        self._executor = executor
        self._batcher = batcher
        self._admission = admission
        self._clock = clock
        self._turns = Turns()
        self.drained = asyncio.Event()
        self._initial_states: dict[tuple[VersionKey, str], FloatArray] = {}

    async def start(self) -> None:
        """Loads or finds the models. Until then everything that needs one is refused with ExecutorUnavailable.

        Raises:
            ModelLoadError: there is nothing to serve.
        """
        await self._executor.start()
        self.catalog.open()

    async def step(self, call: StepCall) -> StepReply:
        """Applies one step, exactly once where it says its position.

        Any failure before the commit leaves the session as it was.

        Raises:
            ServiceError: see the table of docs/api.md.
        """
        with self._admission.permit(call.inputs.nbytes):
            try:
                async with asyncio.timeout_at(call.deadline), self._turns.of(call.key):
                    return await self._apply(call, await self._store.load(call.key))
            except TimeoutError:
                raise DeadlineExceeded(
                    "the step's time limit passed; whether it was applied shows when it is sent again"
                ) from None

    async def _apply(self, call: StepCall, session: Session) -> StepReply:
        """Checked out: replay, or run and commit; once more where the session moved on meanwhile."""
        verdict = judge(session, call.position, call.digest)
        if verdict is not Verdict.RUN:
            # What the caller is told must not come out of a cache.
            session = await self._store.load(call.key, fresh=True)
            verdict = judge(session, call.position, call.digest)
        while verdict is Verdict.RUN:
            outcome = await self._store.commit(call.key, await self._run(call, session))
            if isinstance(outcome, Committed):
                return _last(outcome.session).reply
            verdict, session = outcome.verdict, outcome.session
        if verdict is Verdict.REPLAY:
            return _last(session).reply
        raise _refusal(call, session, verdict)

    async def _run(self, call: StepCall, session: Session) -> Commit:
        """Runs the step on a session's state. Nothing is written yet."""
        version = self.catalog.pinned(session.info)
        _check_against(version, call, session)
        await self._store.extend(call.key, call.deadline - self._clock() + _CHECKOUT_MARGIN_S)
        outputs, state = await self._batcher.submit(version, call.inputs, session.state, call.deadline)
        return Commit(
            token=session.token,
            position=call.position,
            begin=session.position,
            digest=call.digest,
            state=state,
            reply=StepReply(session.position + len(call.inputs), outputs),
        )

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

    async def delete(self, key: SessionKey) -> None:
        """Ends a session. A step of it that is running will find it gone."""
        await self._store.delete(key)

    async def inspect(self, key: SessionKey) -> InspectedState:
        """The session's state by component, as of its last commit.

        Raises:
            SessionNotFound, ModelVersionUnavailable, FingerprintMismatch, CorruptState: see docs/api.md.
        """
        session = await self.get(key)
        version = self.catalog.pinned(session.info)
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

    async def sweep_forever(self, every: float) -> NoReturn:
        """Removes expired sessions, every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(every)
            await self._store.sweep()

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
