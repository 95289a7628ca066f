"""A step that came by itself: what ``Express`` does with many at a time, without what it takes to tell them apart.

The same rules: it is begun where it has nothing to wait for but its batch, and ends with its commit; whatever is out of
the ordinary goes the long way, through ``Engine.step``, which alone tells what is wrong. Most connections send one step
and wait for it, so this is the way of most messages: each object that it does without shows.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import TypeAlias

from service.chunk import Chunk
from service.deadlines import Deadlines
from service.errors import DeadlineExceeded, ServiceError
from service.express import LOOK_AGAIN, Came, Parts
from service.sessions import Commit, Refused, Session, Told
from service.types import FloatArray, ModelVersion, SessionKey, StepCall, StepReply, tuple_of

_log = logging.getLogger(__name__)

# Called with a step that is through, and what it came to.
Ended: TypeAlias = Callable[["SingleStep", Came], None]


class SingleStep:
    """One step under way. For the batcher it is where the outcome of its chunk goes, for its stream a handle.

    Attributes:
        call: What was asked for.
        session: What it runs on.
        version: The model version.
        began: When it was taken on, on the timer.
        gone: The only row of its chunk once it was given up; nothing before.
        over: It is through: it holds nothing any more, and what it came to has been told.
    """

    __slots__ = (
        "_chunk",
        "_ended",
        "_name",
        "_singles",
        "began",
        "call",
        "gone",
        "over",
        "session",
        "tick",
        "version",
    )

    def __init__(
        self,
        singles: "Singles",
        call: StepCall,
        name: str,
        session: Session,
        version: ModelVersion,
        ended: Ended,
        began: float,
    ) -> None:
        self._singles = singles
        self._name = name
        self._ended = ended
        self.over = False
        self._chunk: Chunk | None = None
        self.call = call
        self.session = session
        self.version = version
        self.began = began
        self.gone: Collection[int] = ()
        self.tick = 0

    def __len__(self) -> int:
        """How many are not through: it is, or not."""
        return 0 if self.over else 1

    def start(self, tick: int, chunk: Chunk) -> None:
        """It waits for its batch."""
        self.tick, self._chunk = tick, chunk

    def names(self) -> Iterable[str]:
        """What it may be cancelled by."""
        return () if self.over else (self._name,)

    def cancel(self, name: str | None = None) -> None:
        """Its caller gives it up, if this is its name; whatever it is called where there is none."""
        if name is None or name == self._name:
            self._give_up(asyncio.CancelledError())

    def expire(self) -> None:
        """Its time limit has passed."""
        self._give_up(
            DeadlineExceeded("the step's time limit passed; whether it was applied shows when it is sent again")
        )

    def set_results(self, rows: Sequence[int], outputs: FloatArray, states: FloatArray, native: object = None) -> None:
        """Its batch is through: commits the new state, and only then is it answered."""
        if self.gone:
            return
        try:
            self._singles.commit(self, outputs[0], states[0])
        except Exception as error:  # noqa: BLE001 - it is told to the caller, and the batcher goes on
            self._end(error)

    def committed(self, committing: float, told: Told) -> None:
        """Its commit is through, or nobody knows. If it was given up meanwhile, its caller has been told already."""
        came: Came
        if isinstance(told, Session):
            self._singles.told(self, committing)
            came = None if told.last is None else told.last.reply
        elif isinstance(told, Refused):
            self._singles.refused(self, told)
            came = None
        else:
            came = told
        self._end(came)

    def set_exception(self, rows: Sequence[int], error: BaseException) -> None:
        """It could not be run."""
        self._end(None if isinstance(error, LOOK_AGAIN) else error)

    def _give_up(self, error: BaseException) -> None:
        chunk, self.gone = self._chunk, (0,)
        self._end(error)
        if chunk is not None:
            chunk.leave(0)

    def _end(self, came: Came) -> None:
        """Lets go of what it held, and tells what it came to; once."""
        if self.over:
            return
        self.over = True
        self._chunk = None  # which refers to this: neither should have to wait for the garbage collector
        if isinstance(came, ServiceError):
            came.version = self.version.key
        self._singles.end(self)
        try:
            self._ended(self, came)
        except Exception:  # noqa: BLE001 - the batcher, which called this, goes on
            _log.exception("a step that is through could not be answered")


class Singles:
    """Begins and ends single steps of sessions that are in this process, if only as copies of the store's."""

    def __init__(self, parts: Parts) -> None:
        self._store = parts.store
        self._catalog = parts.catalog
        self._batcher = parts.batcher
        self._admission = parts.admission
        self._turns = parts.turns
        self._held = parts.turns.held
        self._checkout = parts.checkout
        self._observer = parts.observer
        self._timer = parts.timer
        self._deadlines = Deadlines()
        self._last: SessionKey | None = None  # whose step came last

    def begin(self, call: StepCall, name: str, owner_limit: int | None, ended: Ended) -> SingleStep | None:
        """Takes a step on; None where it has to go the long way: then nothing has happened.

        Args:
            call: The step.
            name: What it may be cancelled by.
            owner_limit: The most steps that the session's owner may have under way.
            ended: Called with the step when it is through: before this returns where the step had nothing to wait for.
        """
        began = self._timer()
        if call.key in self._held:
            return None
        try:
            session = self._store.at_hand(call.key, self._checkout(call.deadline))
        except Exception:  # noqa: BLE001 - the long way fails too, and knows what to make of it
            return None
        # The condition on the position is when ``judge`` says RUN.
        if session is None or not (call.position is None or call.position == session.position):
            return None
        inputs, state = call.inputs, session.state
        try:
            version = self._catalog.pinned(session.info)
            if inputs.shape[1] != version.input_dim or not (state is None or state.shape == (version.state_size,)):
                return None
            self._admission.take(inputs.nbytes, call.caller, owner_limit)
        except ServiceError:
            return None
        self._turns.take_one(call.key)
        step = SingleStep(self, call, name, session, version, ended, began)
        # Who sends the next step once the last one is answered, and nobody else: waiting for company is for nothing.
        lone, self._last = call.key == self._last, call.key
        chunk = self._batcher.put(
            version, inputs[None], [state], call.deadline, step, call.caller, lone=lone, source=call.key
        )
        if not step.over:
            step.start(self._deadlines.add(step, call.deadline), chunk)
        return step

    async def step(self, call: StepCall, owner_limit: int | None) -> StepReply | None:
        """Takes a step on and waits for it; None where it has to go the long way: then nothing was applied.

        Raises:
            ServiceError: as of ``Engine.step``.
        """
        outcome: asyncio.Future[Came] = asyncio.get_running_loop().create_future()

        def ended(step: SingleStep, came: Came) -> None:
            if not outcome.done():
                outcome.set_result(came)

        step = self.begin(call, "", owner_limit, ended)
        if step is None:
            return None
        try:
            came = await outcome
        except asyncio.CancelledError:
            step.cancel()
            raise
        if isinstance(came, BaseException):
            try:
                raise came
            finally:
                del came, outcome  # it holds this frame, which must not hold it
        return came

    def commit(self, step: SingleStep, outputs: FloatArray, state: FloatArray) -> None:
        """Has what a step came to written; the store tells it how that went. Both arrays are the batch's."""
        committing = self._timer()
        call, session = step.call, step.session
        begin = session.position
        reply = tuple_of(StepReply, (begin + len(outputs), outputs.copy()))
        commit = tuple_of(Commit, (session.token, call.position, begin, call.digest, state.copy(), reply))
        self._store.commit_one_soon(session, commit, lambda told: step.committed(committing, told))

    def told(self, step: SingleStep, committing: float) -> None:
        """Its commit was written."""
        now = self._timer()
        self._observer.steps_committed(step.version.key, 1, now - step.began, now - committing)

    def refused(self, step: SingleStep, outcome: Refused) -> None:
        """The session is no longer what the step ran on: the long way finds out what that means."""
        self._observer.commit_refused(step.version.key, outcome.verdict.value)

    def end(self, step: SingleStep) -> None:
        """Lets go of what a step held."""
        call = step.call
        self._deadlines.discard(step, step.tick)
        self._turns.release_one(call.key)
        self._admission.give_back(call.inputs.nbytes, call.caller)
