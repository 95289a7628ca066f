"""Steps that have nothing to wait for but their batch: what ``Engine.step`` does, without a task for each.

Most steps find their session in this process, if only as a copy of the store's, and its turn free. From then on they
wait for their batch, and for their commit where the store is elsewhere: they are begun by one call and ended by others,
which at many steps a message is half of what the gateway costs. Whatever is out of the ordinary (a session that is
being stepped, a repeated step, anything to refuse) goes the long way, through ``Engine.step``, which alone tells what
is wrong.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

from service.admission import Admission
from service.batcher import Batcher, Chunk
from service.catalog import Catalog
from service.deadlines import Deadlines
from service.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidTensor,
    ModelVersionUnavailable,
    ServiceError,
)
from service.observing import Observer
from service.sessions import Commit, Committed, LocalStore, Refused, Session, Verdict, judge
from service.turns import Turns
from service.types import FloatArray, ModelVersion, StepCall, StepReply

_log = logging.getLogger(__name__)

# These may tell of a session that was deleted and made anew meanwhile; ``Engine.step`` looks.
_LOOK_AGAIN = (ModelVersionUnavailable, FingerprintMismatch, InvalidTensor)


class ExpressStep:
    """One step under way. For the batcher it stands for the future of its chunk, for the store for its commit's.

    Attributes:
        tag: Whatever its caller wants to find again.
        began: When it was taken on, on the timer.
        reply: What it came to.
        error: Why it failed. With neither, nothing was applied, and it has to go the long way after all.
    """

    __slots__ = (
        "_committing",
        "_express",
        "_finish",
        "_over",
        "began",
        "call",
        "chunk",
        "error",
        "owner_limit",
        "reply",
        "session",
        "tag",
        "tick",
    )

    def __init__(
        self,
        express: "Express",
        call: StepCall,
        session: Session,
        owner_limit: int | None,
        tag: Any,
        finish: Callable[["ExpressStep"], None],
        began: float,
    ) -> None:
        self._express = express
        self._finish = finish
        self._over = False
        self.call = call
        self.session = session
        self.owner_limit = owner_limit
        self.tag = tag
        self.began = began
        self._committing = began
        self.chunk: Chunk | None = None
        self.tick = 0
        self.reply: StepReply | None = None
        self.error: BaseException | None = None

    def done(self) -> bool:
        """Whether it is through, one way or another."""
        return self._over

    def set_result(self, result: tuple[FloatArray, FloatArray]) -> None:
        """Its batch is through: commits the new state, and only then is the step answered."""
        self.chunk = None
        self._committing = self._express.timer()
        try:
            self._express.commit(self, *result)
        except Exception as error:  # noqa: BLE001 - it is told to the caller, and the batcher goes on
            self.error = error
            self._end()

    def committed(self, outcome: Committed | Refused | Exception) -> None:
        """Its commit is through, or nobody knows. Whom it was given up by has been told already."""
        if self._over:
            return
        if isinstance(outcome, Committed):
            self.reply = self._express.committed(self, outcome, self._committing)
        elif isinstance(outcome, Refused):
            self._express.refused(self, outcome)
        else:
            self.error = outcome
        self._end()

    def set_exception(self, error: BaseException) -> None:
        """It could not be run."""
        if not isinstance(error, _LOOK_AGAIN):
            self.error = error
        self._end()

    def cancel(self) -> None:
        """Its caller gives it up."""
        self._give_up(asyncio.CancelledError())

    def expire(self) -> None:
        """Its time limit has passed."""
        self._give_up(
            DeadlineExceeded("the step's time limit passed; whether it was applied shows when it is sent again")
        )

    def _give_up(self, error: BaseException) -> None:
        if self._over:
            return
        self.error = error
        chunk = self.chunk
        self._end()
        if chunk is not None:
            chunk.leave()

    def _end(self) -> None:
        self._over = True
        if isinstance(self.error, ServiceError):
            self.error.version = self.session.info.version
        self.chunk = None
        self._express.end(self)
        try:
            self._finish(self)
        except Exception:  # noqa: BLE001 - the batcher, which called this, goes on
            _log.exception("a step that is through could not be answered")


class Express:
    """Begins and ends the steps of sessions that are in this process, if only as copies of the store's.

    Args:
        store: Keeps the sessions.
        catalog: The models that are served.
        batcher: Batches steps.
        admission: How much is taken on.
        turns: One step of a session runs at a time.
        check: Raises where a call does not fit its session and model.
        checkout: Seconds for which a session is kept for a step with this deadline.
        observer: Hears of every step.
        timer: Seconds: what durations are told by.
    """

    def __init__(
        self,
        *,
        store: LocalStore,
        catalog: Catalog,
        batcher: Batcher,
        admission: Admission,
        turns: Turns,
        check: Callable[[ModelVersion, StepCall, Session], None],
        checkout: Callable[[float], float],
        observer: Observer,
        timer: Callable[[], float],
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._batcher = batcher
        self._admission = admission
        self._turns = turns
        self._check = check
        self._checkout = checkout
        self._observer = observer
        self.timer = timer
        self._deadlines = Deadlines()

    def begin(
        self, call: StepCall, owner_limit: int | None, tag: Any, finish: Callable[[ExpressStep], None]
    ) -> ExpressStep | None:
        """Takes a step on, unless it has to go the long way: then nothing has happened.

        Args:
            call: The step.
            owner_limit: The most steps that the session's owner may have under way.
            tag: Kept in the step.
            finish: Called once with the step when it is through; never before this returns.

        Returns:
            The step under way, or None.

        Raises:
            ServiceError: it has to go the long way, which will say this in its turn.
        """
        began = self.timer()
        if not self._turns.free(call.key):
            return None
        session = self._store.load_now(call.key)
        if session is None or judge(session, call.position, call.digest) is not Verdict.RUN:
            return None
        version = self._catalog.pinned(session.info)
        self._check(version, call, session)
        self._admission.take(call.inputs.nbytes, call.caller, owner_limit)
        self._turns.take(call.key)
        if not self._store.extend_now(call.key, self._checkout(call.deadline)):
            self._let_go(call)
            return None
        step = ExpressStep(self, call, session, owner_limit, tag, finish, began)
        step.tick = self._deadlines.add(step, call.deadline)
        step.chunk = self._batcher.put(version, call.inputs, session.state, call.deadline, step, call.caller)
        return step

    def commit(self, step: ExpressStep, outputs: FloatArray, state: FloatArray) -> None:
        """Has what a step came to written; the store tells the step how that went."""
        call, session = step.call, step.session
        reply = StepReply(session.position + len(call.inputs), outputs)
        commit = Commit(session.token, call.position, session.position, call.digest, state, reply)
        self._store.commit_soon(session, commit, step.committed)

    def committed(self, step: ExpressStep, outcome: Committed, committing: float) -> StepReply | None:
        """The reply of a step whose commit was written."""
        now = self.timer()
        self._observer.step_committed(step.session.info.version, now - step.began, now - committing)
        last = outcome.session.last
        return last.reply if last is not None else None

    def refused(self, step: ExpressStep, outcome: Refused) -> None:
        """Its session is no longer what it ran on: the long way finds out what that means."""
        self._observer.commit_refused(step.session.info.version, outcome.verdict.value)

    def end(self, step: ExpressStep) -> None:
        """Lets go of what a step held."""
        self._deadlines.discard(step, step.tick)
        self._let_go(step.call)

    def _let_go(self, call: StepCall) -> None:
        self._turns.release(call.key)
        self._admission.give_back(call.inputs.nbytes, call.caller)
