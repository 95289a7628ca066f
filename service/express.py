"""Steps that have nothing to wait for but their batch: what ``Engine.step`` does, many at a time and without tasks.

Most steps find their session in this process, if only as a copy of the store's, and its turn free. Those of one message
that look alike then go through the gateway as one: rows of one chunk, begun by one call and ended by another, so that
what Python does for each of them is little more than to look up its session and to write its commit. Whatever is out of
the ordinary (a session that is being stepped, a repeated step, anything to refuse) goes the long way, through
``Engine.step``, which alone tells what is wrong.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from service.admission import Admission
from service.batcher import Batcher
from service.catalog import Catalog
from service.chunk import Chunk
from service.deadlines import Deadlines
from service.errors import (
    DeadlineExceeded,
    FingerprintMismatch,
    InvalidTensor,
    ModelVersionUnavailable,
    ServiceError,
)
from service.observing import Observer
from service.sessions import Commit, LocalStore, Refused, Session, Told, Verdict, judge
from service.turns import Turns
from service.types import FloatArray, ModelVersion, SessionKey, StepCalls, StepReply, tuple_of

_log = logging.getLogger(__name__)

# These may tell of a session that was deleted and made anew meanwhile; ``Engine.step`` looks.
_LOOK_AGAIN = (ModelVersionUnavailable, FingerprintMismatch, InvalidTensor)

# What a step came to: its reply; why it failed; or None: nothing was applied, and it has to go the long way after all.
Came: TypeAlias = StepReply | BaseException | None
# Called with some steps that are through, by their places in ``StepCalls``, and what each of them came to.
Ended: TypeAlias = Callable[["ExpressSteps", Sequence[int], Sequence[Came]], None]


class ExpressSteps:
    """Steps under way of sessions on one model version. For the batcher they are where the outcome of its chunk goes.

    Attributes:
        calls: What they are steps of.
        version: The model version.
        began: When they were taken on, on the timer.
        gone: Rows that were given up before they were through.
    """

    __slots__ = (
        "_ended",
        "_express",
        "_open",
        "began",
        "calls",
        "chunk",
        "gone",
        "places",
        "sessions",
        "tick",
        "version",
    )

    def __init__(self, express: "Express", calls: StepCalls, version: ModelVersion, ended: Ended, began: float) -> None:
        self._express = express
        self._ended = ended
        self._open: set[int] = set()  # rows that are not through
        self.calls = calls
        self.version = version
        self.began = began
        self.gone: set[int] = set()
        # By row: its place in ``calls``, and the session that it runs on.
        self.places: list[int] = []
        self.sessions: list[Session] = []
        self.chunk: Chunk | None = None
        self.tick = 0

    def __len__(self) -> int:
        """How many are not through."""
        return len(self._open)

    def start(self, tick: int, chunk: Chunk) -> None:
        """All its rows are there, and wait for their batch."""
        self.tick, self.chunk = tick, chunk
        self._open.update(range(len(self.places)))

    def names(self) -> Iterable[str]:
        """What those that are not through may be cancelled by."""
        return (self.calls.names[self.places[row]] for row in self._open)

    def cancel(self, name: str | None = None) -> None:
        """Its caller gives up the step of this name; all of them where there is none."""
        rows = [row for row in self._open if name is None or self.calls.names[self.places[row]] == name]
        self._give_up(rows, asyncio.CancelledError())

    def expire(self) -> None:
        """Their time limit has passed."""
        error = DeadlineExceeded("the step's time limit passed; whether it was applied shows when it is sent again")
        self._give_up(self._open, error)

    def set_results(self, rows: Sequence[int], outputs: FloatArray, states: FloatArray) -> None:
        """Their batch is through: commits the new states, and only then are they answered."""
        try:
            self._express.commit(self, rows, outputs, states)
        except Exception as error:  # noqa: BLE001 - it is told to the caller, and the batcher goes on
            self._through(rows, [error] * len(rows))

    def committed(self, rows: Sequence[int], committing: float, told: Sequence[Told]) -> None:
        """Their commits are through, or nobody knows. Whom one was given up by has been told already."""
        came: list[Came] = []
        written = 0
        for one in told:
            if isinstance(one, Session):
                written += 1
                came.append(one.last.reply if one.last is not None else None)
            elif isinstance(one, Refused):
                self._express.refused(self, one)
                came.append(None)
            else:
                came.append(one)
        if written:
            self._express.told(self, written, committing)
        self._through(rows, came)

    def set_exception(self, rows: Sequence[int], error: BaseException) -> None:
        """They could not be run."""
        self._through(rows, [None if isinstance(error, _LOOK_AGAIN) else error] * len(rows))

    def _give_up(self, rows: Iterable[int], error: BaseException) -> None:
        rows = tuple(rows)
        self.gone.update(rows)
        chunk = self.chunk
        self._through(rows, [error] * len(rows))
        if chunk is not None:
            for row in rows:
                chunk.leave(row)

    def _through(self, rows: Sequence[int], came: Sequence[Came]) -> None:
        """Lets go of what they held, and tells what they came to; each of them once."""
        if not self._open.issuperset(rows):
            open_ = [at for at, row in enumerate(rows) if row in self._open]
            rows, came = [rows[at] for at in open_], [came[at] for at in open_]
        if not rows:
            return
        self._open.difference_update(rows)
        if not self._open:
            self.chunk = None  # which refers to this: neither should have to wait for the garbage collector
        for one in came:
            if isinstance(one, ServiceError):
                one.version = self.version.key
        self._express.end(self, rows)
        try:
            self._ended(self, [self.places[row] for row in rows], came)
        except Exception:  # noqa: BLE001 - the batcher, which called this, goes on
            _log.exception("steps that are through could not be answered")


class Express:
    """Begins and ends the steps of sessions that are in this process, if only as copies of the store's.

    Args:
        store: Keeps the sessions.
        catalog: The models that are served.
        batcher: Batches steps.
        admission: How much is taken on.
        turns: One step of a session runs at a time.
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
        checkout: Callable[[float], float],
        observer: Observer,
        timer: Callable[[], float],
    ) -> None:
        self._store = store
        self._catalog = catalog
        self._batcher = batcher
        self._admission = admission
        self._turns = turns
        self._checkout = checkout
        self._observer = observer
        self._timer = timer
        self._deadlines = Deadlines()

    def begin(
        self, calls: StepCalls, owner_limit: int | None, ended: Ended
    ) -> tuple[Sequence[ExpressSteps], Sequence[int]]:
        """Takes steps on, except for those that have to go the long way: for them nothing has happened.

        Args:
            calls: The steps, each of another session.
            owner_limit: The most steps that the sessions' owner may have under way.
            ended: Called with the steps when they are through, with some or all of them; never before this returns.

        Returns:
            The steps under way, by model version, and the places of those that have to go the long way.
        """
        began = self._timer()
        seconds = self._checkout(calls.deadline)
        by_version: dict[tuple[object, str], ExpressSteps] = {}
        left: list[int] = []
        for place, (session_id, position, digest) in enumerate(
            zip(calls.session_ids, calls.positions, calls.digests, strict=True)
        ):
            session = self._at_hand(tuple_of(SessionKey, (calls.principal, session_id)), position, digest, seconds)
            if session is None:
                left.append(place)
                continue
            info = session.info
            steps = by_version.get((info.version, info.fingerprint))
            if steps is None:
                try:
                    version = self._catalog.pinned(info)
                except ServiceError:
                    left.append(place)
                    continue
                steps = ExpressSteps(self, calls, version, ended, began)
                by_version[info.version, info.fingerprint] = steps
            if not _fits(steps.version, calls.inputs, session.state):
                left.append(place)
                continue
            self._turns.take(info.key)
            steps.places.append(place)
            steps.sessions.append(session)
        begun = [steps for steps in by_version.values() if steps.places and self._start(steps, owner_limit, left)]
        return begun, left

    def _at_hand(self, key: SessionKey, position: int | None, digest: bytes, seconds: float) -> Session | None:
        """The session, if this is its next step and nothing stands in the way."""
        if not self._turns.free(key):
            return None
        try:
            session = self._store.load_now(key)
            if session is None or judge(session, position, digest) is not Verdict.RUN:
                return None
            return session if self._store.extend_now(session, seconds) else None
        except Exception:  # noqa: BLE001 - the long way fails too, and knows what to make of it
            return None

    def _start(self, steps: ExpressSteps, owner_limit: int | None, left: list[int]) -> bool:
        """Puts steps in their queue; where there is no room for all of them, all go the long way."""
        calls, rows = steps.calls, len(steps.places)
        try:
            self._admission.take(rows * _bytes_of_one(calls), calls.caller, owner_limit, rows)
        except ServiceError:
            for session in steps.sessions:
                self._turns.release(session.info.key)
            left += steps.places
            left.sort()
            return False
        inputs = calls.inputs if rows == len(calls.inputs) else calls.inputs[steps.places]
        states = [session.state for session in steps.sessions]
        chunk = self._batcher.put(steps.version, inputs, states, calls.deadline, steps, calls.caller)
        steps.start(self._deadlines.add(steps, calls.deadline), chunk)
        return True

    def commit(self, steps: ExpressSteps, rows: Sequence[int], outputs: FloatArray, states: FloatArray) -> None:
        """Has what steps came to written; the store tells them how that went."""
        committing = self._timer()
        if steps.gone:
            kept = [at for at, row in enumerate(rows) if row not in steps.gone]
            rows, outputs, states = [rows[at] for at in kept], outputs[kept], states[kept]
            if not rows:
                return
        positions, digests, places = steps.calls.positions, steps.calls.digests, steps.places
        time = outputs.shape[1]
        sessions = [steps.sessions[row] for row in rows]
        commits = []
        for row, session, output, state in zip(rows, sessions, outputs, states, strict=True):
            place, begin = places[row], session.position
            # Copies, so that no session holds on to a whole batch.
            reply = tuple_of(StepReply, (begin + time, output.copy()))
            commit = (session.token, positions[place], begin, digests[place], state.copy(), reply)
            commits.append(tuple_of(Commit, commit))
        self._store.commit_soon(sessions, commits, functools.partial(steps.committed, rows, committing))

    def told(self, steps: ExpressSteps, count: int, committing: float) -> None:
        """So many commits of steps were written."""
        now = self._timer()
        self._observer.steps_committed(steps.version.key, count, now - steps.began, now - committing)

    def refused(self, steps: ExpressSteps, outcome: Refused) -> None:
        """A session is no longer what its step ran on: the long way finds out what that means."""
        self._observer.commit_refused(steps.version.key, outcome.verdict.value)

    def end(self, steps: ExpressSteps, rows: Sequence[int]) -> None:
        """Lets go of what steps held."""
        if not steps:
            self._deadlines.discard(steps, steps.tick)
        for row in rows:
            self._turns.release(steps.sessions[row].info.key)
        self._admission.give_back(len(rows) * _bytes_of_one(steps.calls), steps.calls.caller, len(rows))


def _bytes_of_one(calls: StepCalls) -> int:
    return calls.inputs.nbytes // len(calls.inputs)


def _fits(version: ModelVersion, inputs: FloatArray, state: FloatArray | None) -> bool:
    """Whether a model takes them; where it does not, the long way says so."""
    return inputs.shape[2] == version.input_dim and (state is None or state.shape == (version.state_size,))
