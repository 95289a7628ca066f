"""Steps that have nothing to wait for but their batch: what ``Engine.step`` does, many at a time and without tasks.

Most steps find their session in this process, if only as a copy of the store's, and its turn free. Those of one message
that look alike then go through the gateway as one: rows of one chunk, begun by one call and ended by another, so that
what Python does for each of them is little more than to look up its session and to write its commit. Whatever is out of
the ordinary (a session that is being stepped, a repeated step, anything to refuse) goes the long way, through
``Engine.step``, which alone tells what is wrong. Sessions that were stepped together before, and now are again, are one
value (``Cohort``): little but their turns is taken for each of them.
"""

import asyncio
import functools
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
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
from service.sessions import LocalStore, Refused, Session, SessionInfo, Told
from service.sessions.cohort import Cohort, Commits, Replies
from service.turns import Turns
from service.types import FloatArray, ModelVersion, SessionKey, StepCalls, StepReply, take, tuple_of

_log = logging.getLogger(__name__)

# These may tell of a session that was deleted and made anew meanwhile; ``Engine.step`` looks.
LOOK_AGAIN = (ModelVersionUnavailable, FingerprintMismatch, InvalidTensor)

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
        "keys",
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
        # By row: its place in ``calls``, and the session that it runs on, with its key.
        self.places: Sequence[int] = ()
        self.sessions: Sequence[Session] = ()
        self.keys: Sequence[SessionKey] = ()
        self.chunk: Chunk | None = None
        self.tick = 0

    def __len__(self) -> int:
        """How many are not through."""
        return len(self._open)

    def fill(self, places: Sequence[int], sessions: Sequence[Session], keys: Sequence[SessionKey]) -> None:
        """Says which they are, by row."""
        self.places, self.sessions, self.keys = places, sessions, keys

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

    def set_results(self, rows: Sequence[int], outputs: FloatArray, states: FloatArray, native: object = None) -> None:
        """Their batch is through: commits the new states, and only then are they answered."""
        try:
            self._express.commit(self, rows, outputs, states, native)
        except Exception as error:  # noqa: BLE001 - it is told to the caller, and the batcher goes on
            self._through(rows, [error] * len(rows))

    def committed(self, rows: Sequence[int], committing: float, told: Sequence[Told]) -> None:
        """Their commits are through, or nobody knows. Whom one was given up by has been told already."""
        if isinstance(told, Cohort):
            self._express.told(self, len(told), committing)
            self._through(rows, told.replies)
            return
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
        self._through(rows, [None if isinstance(error, LOOK_AGAIN) else error] * len(rows))

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
        if not isinstance(came, Replies):
            for one in came:
                if isinstance(one, ServiceError):
                    one.version = self.version.key
        self._express.end(self, rows)
        try:
            self._ended(self, take(self.places, rows), came)
        except Exception:  # noqa: BLE001 - the batcher, which called this, goes on
            _log.exception("steps that are through could not be answered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What steps without tasks go through.

    Attributes:
        store: Keeps the sessions.
        catalog: The models that are served.
        batcher: Batches steps.
        admission: How much is taken on.
        turns: One step of a session runs at a time.
        checkout: Seconds for which a session is kept for a step with this deadline.
        observer: Hears of every step.
        timer: Seconds: what durations are told by.
    """

    store: LocalStore
    catalog: Catalog
    batcher: Batcher
    admission: Admission
    turns: Turns
    checkout: Callable[[float], float]
    observer: Observer
    timer: Callable[[], float]


class Express:
    """Begins and ends the steps of sessions that are in this process, if only as copies of the store's."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._catalog = parts.catalog
        self._batcher = parts.batcher
        self._admission = parts.admission
        self._turns = parts.turns
        self._checkout = parts.checkout
        self._observer = parts.observer
        self._timer = parts.timer
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
            The steps under way, by model version and cohort, and the places of those that have to go the long way.
        """
        began = self._timer()
        begun: list[ExpressSteps] = []
        left: list[int] = []
        for steps in self._sort(calls, ended, began, left):
            if self._start(steps, owner_limit):
                begun.append(steps)
            else:
                left += steps.places
        left.sort()
        return begun, left

    def _sort(self, calls: StepCalls, ended: Ended, began: float, left: list[int]) -> Sequence[ExpressSteps]:
        """The steps that need not go the long way, those of a cohort by themselves; ``left`` gets the other places."""
        sorted_: list[ExpressSteps] = []
        rest: list[int] = []
        at, end = 0, len(calls.session_ids)
        for place, cohort in self._cohorts(calls):
            steps = self._steps_of(cohort.info, calls, ended, began)
            if steps is None or cohort.states.shape[1:] != (steps.version.state_size,):
                continue  # each by itself comes to the same
            steps.fill(range(place, place + len(cohort)), cohort, cohort.keys)
            sorted_.append(steps)
            rest += range(at, place)
            at = place + len(cohort)
        rest += range(at, end)
        if rest:
            sorted_ += self._sort_single(calls, rest, ended, began, left)
        return sorted_

    def _cohorts(self, calls: StepCalls) -> Sequence[tuple[int, Cohort]]:
        """Those whose next steps these are, with the places of their first; each as ``_at_hand``."""
        try:
            found = self._store.cohorts_now(calls.principal, calls.session_ids, self._checkout(calls.deadline))
        except Exception:  # noqa: BLE001 - the long way fails too, and knows what to make of it
            return ()
        held, positions = self._turns.held, calls.positions
        return [
            (place, cohort)
            for place, cohort in found
            if held.isdisjoint(cohort.keys) and _are_next(positions[place : place + len(cohort)], cohort.positions)
        ]

    def _sort_single(
        self, calls: StepCalls, places: Sequence[int], ended: Ended, began: float, left: list[int]
    ) -> Sequence[ExpressSteps]:
        """The same of steps of which each has a session by itself."""
        by_version: dict[tuple[object, str], ExpressSteps | None] = {}
        rows: dict[ExpressSteps, tuple[list[int], list[Session]]] = {}
        steps, version, fingerprint, size = None, None, None, 0
        for place, session in zip(places, self._at_hand(calls, places), strict=True):
            if session is None:
                left.append(place)
                continue
            info = session.info
            if info.version is not version or info.fingerprint != fingerprint:  # seldom from one row to the next
                version, fingerprint = info.version, info.fingerprint
                if (version, fingerprint) not in by_version:
                    by_version[version, fingerprint] = self._steps_of(info, calls, ended, began)
                steps = by_version[version, fingerprint]
                if steps is not None:
                    size = steps.version.state_size
                    its_places, its_sessions = rows.setdefault(steps, ([], []))
            if steps is None or not (session.state is None or session.state.shape == (size,)):
                left.append(place)
                continue
            its_places.append(place)
            its_sessions.append(session)
        for steps, (its_places, its_sessions) in rows.items():
            steps.fill(its_places, its_sessions, [session.info.key for session in its_sessions])
        return [steps for steps in rows if steps.places]

    def _at_hand(self, calls: StepCalls, places: Sequence[int]) -> Sequence[Session | None]:
        """The sessions whose next steps these are; None where something stands in the way."""
        principal, held = calls.principal, self._turns.held
        keys = [tuple_of(SessionKey, (principal, session_id)) for session_id in take(calls.session_ids, places)]
        positions = take(calls.positions, places)
        try:
            # The condition on the position is when ``judge`` says RUN.
            free = [
                session
                if session is not None and key not in held and (position is None or position == session.position)
                else None
                for key, session, position in zip(keys, self._store.load_now(keys), positions, strict=True)
            ]
            return self._store.extend_now(free, self._checkout(calls.deadline))
        except Exception:  # noqa: BLE001 - the long way fails too, and knows what to make of it
            return [None] * len(keys)

    def _steps_of(self, info: SessionInfo, calls: StepCalls, ended: Ended, began: float) -> ExpressSteps | None:
        """What takes the steps of sessions like this one; None where they have to go the long way."""
        try:
            version = self._catalog.pinned(info)
        except ServiceError:
            return None
        if calls.inputs.shape[2] != version.input_dim:  # the long way says so
            return None
        return ExpressSteps(self, calls, version, ended, began)

    def _start(self, steps: ExpressSteps, owner_limit: int | None) -> bool:
        """Puts steps in their queue; where there is no room for all of them, for none."""
        calls, rows = steps.calls, len(steps.places)
        try:
            self._admission.take(rows * _bytes_of_one(calls), calls.caller, owner_limit, rows)
        except ServiceError:
            return False
        self._turns.take(steps.keys)
        inputs = calls.inputs
        if rows < len(inputs):
            places = steps.places
            inputs = inputs[places.start : places.stop] if isinstance(places, range) else inputs[places]
        states: FloatArray | list[FloatArray | None]
        if isinstance(steps.sessions, Cohort):
            states, native = steps.sessions.states, steps.sessions.native
        else:
            states, native = [session.state for session in steps.sessions], None
        chunk = self._batcher.put(
            *(steps.version, inputs, states, calls.deadline, steps, calls.caller, native), source=steps.keys[0]
        )
        steps.start(self._deadlines.add(steps, calls.deadline), chunk)
        return True

    def commit(
        self,
        steps: ExpressSteps,
        rows: Sequence[int],
        outputs: FloatArray,
        states: FloatArray,
        native: object,
    ) -> None:
        """Has what steps came to written; the store tells them how that went."""
        committing = self._timer()
        if steps.gone:
            kept = [at for at, row in enumerate(rows) if row not in steps.gone]
            rows, outputs, states, native = [rows[at] for at in kept], outputs[kept], states[kept], None
            if not rows:
                return
        calls, places = steps.calls, take(steps.places, rows)
        commits = Commits(take(calls.positions, places), calls.digests.take(places), outputs, states, native)
        self._store.commit_soon(
            take(steps.sessions, rows), commits, functools.partial(steps.committed, rows, committing)
        )

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
        self._turns.release(take(steps.keys, rows))
        self._admission.give_back(len(rows) * _bytes_of_one(steps.calls), steps.calls.caller, len(rows))


def _are_next(asked: Sequence[int | None], positions: Sequence[int]) -> bool:
    """Whether steps that say this, or nothing, begin at these positions: when ``judge`` says RUN."""
    return asked == positions or all(
        position is None or position == stands for position, stands in zip(asked, positions, strict=True)
    )


def _bytes_of_one(calls: StepCalls) -> int:
    return calls.inputs.nbytes // len(calls.inputs)
