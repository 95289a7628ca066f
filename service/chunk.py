"""A chunk: the time steps of one session, or of several with as many each, on their way through the batcher."""

import itertools
from bisect import bisect_left
from collections.abc import Collection, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from service.types import BoolArray, FloatArray, ModelVersion, StepBatch, batch_of, empty_batch, tuple_of

if TYPE_CHECKING:
    from service.lane import Lane

_NOTHING: FloatArray = np.empty((0, 0, 0), np.float32)


class Outcome(Protocol):
    """Where the outcomes of a chunk's rows go, by the numbers that the rows had when it was put. Nothing may raise."""

    @property
    def gone(self) -> Collection[int]:
        """The rows that nobody waits for any more; often none."""
        ...

    def set_results(
        self, rows: Sequence[int], outputs: FloatArray, states: FloatArray, native: object = None, /
    ) -> None:
        """Their outputs ``[rows, time, output_dim]``, and the states after them ``[rows, state_size]``.

        Both are the batch's: what is kept of them has to be copied. ``native`` is ``StepBatchResult.native`` where they
        are all that the batch had, else None.
        """
        ...

    def set_exception(self, rows: Sequence[int], error: BaseException, /) -> None:
        """Why they could not be run."""
        ...


class Chunk:
    """Rows that run side by side: ``taken`` of their time steps have run and brought them to ``states``.

    ``size`` is the number of its rows, ``turn`` how many time steps run in its batch, ``waits`` whether it
    is in none, ``since`` when it last went into the queue, ``origin`` what it came from, ``source`` who sent it: the
    same for each chunk of a session, or of sessions that are stepped together.

    Args:
        lane: What it is put in.
        inputs: ``[rows, time, input_dim]``. It is read, never written, as are the states.
        states: ``[state_size]`` of each row; None for the model's initial state.
        deadline: On the event loop's clock.
        outcome: Where it goes.
        caller: Who asks.
        native: ``states`` as the executor has them (``StepBatch.native``), where they are an array.
    """

    __slots__ = (
        "_lane",
        "_time",
        "caller",
        "deadline",
        "inputs",
        "native",
        "origin",
        "outcome",
        "outputs",
        "rows",
        "since",
        "size",
        "source",
        "states",
        "taken",
        "turn",
        "waits",
    )

    def __init__(
        self,
        lane: "Lane",
        inputs: FloatArray,
        states: Sequence[FloatArray | None] | FloatArray,
        deadline: float,
        outcome: Outcome,
        caller: str = "",
        native: object = None,
    ) -> None:
        self._lane = lane
        self.caller = caller
        self.inputs = inputs
        self.states: list[FloatArray | None] | FloatArray = states if isinstance(states, np.ndarray) else list(states)
        self.native = native
        self.size: int = len(inputs)
        self._time: int = inputs.shape[1]
        self.rows: Sequence[int] = range(self.size)
        self.deadline = deadline
        self.outcome = outcome
        self.taken = 0
        self.turn = 0
        self.waits = False
        self.since = 0.0
        self.origin: object = None
        self.source: Hashable = None
        self.outputs: list[FloatArray] = []

    @property
    def left(self) -> int:
        """Time steps that are still to run."""
        return self._time - self.taken

    def leave(self, row: int) -> None:
        """The caller gave this row up; it is among those ``gone`` of its outcome."""
        at = bisect_left(self.rows, row)
        if not self.waits or at == self.size or self.rows[at] != row:
            return  # a batch reads it, and runs without it from then on
        if self.size == 1:
            self.inputs, self.states, self.native = _NOTHING, [None], None
            self.outputs.clear()
        elif isinstance(self.states, list):
            self.states[at] = None
        self._lane.left()

    def sift(self) -> bool:
        """Lets go of the rows that nobody waits for; returns whether there is one left."""
        gone = self.outcome.gone
        if gone:
            self.keep([at for at, row in enumerate(self.rows) if row not in gone])
        return self.size > 0

    def keep(self, places: Sequence[int]) -> None:
        """Drops all rows but those at these places."""
        self.size = len(places)
        self.native = None
        self.rows = [self.rows[at] for at in places]
        self.inputs = self.inputs[places] if places else _NOTHING
        self.states = [self.states[at] for at in places] if isinstance(self.states, list) else self.states[places]
        self.outputs = [part[places] for part in self.outputs] if places else []

    def split(self, count: int) -> "Chunk":
        """Its first ``count`` rows, as a chunk of their own; the others stay."""
        self.native = None
        head = Chunk.__new__(Chunk)
        for name in self.__slots__:
            setattr(head, name, getattr(self, name))
        head.size, self.size = count, self.size - count
        head.rows, self.rows = self.rows[:count], self.rows[count:]
        head.inputs, self.inputs = self.inputs[:count], self.inputs[count:]
        head.states, self.states = self.states[:count], self.states[count:]
        head.outputs = [part[:count] for part in self.outputs]
        self.outputs = [part[count:] for part in self.outputs]
        return head

    def gather_inputs(self, inputs: FloatArray) -> None:
        """Writes the time steps of its turn into its rows of a batch; all are of zeros before."""
        inputs[:, : self.turn] = self.inputs[:, self.taken : self.taken + self.turn]

    def gather_states(self, state: FloatArray, reset: BoolArray) -> None:
        """Likewise its states."""
        states = self.states
        if not isinstance(states, list):
            state[:] = states
            return
        if len(states) > 1:
            there = [one for one in states if one is not None]
            if len(there) == len(states):
                np.concatenate(there, out=state.reshape(-1))
                return
        for at, one in enumerate(states):
            if one is None:
                reset[at], state[at] = True, 0
            else:
                state[at] = one

    def advance(self, outputs: FloatArray, states: FloatArray, native: object = None) -> None:
        """Moves it on by the turn that ran, to its outcome or back into the queue.

        Args:
            outputs: ``[rows, turn, output_dim]``, the batch's.
            states: ``[rows, state_size]``, likewise.
            native: ``StepBatchResult.native`` where they are all that the batch had, else None.
        """
        self.taken += self.turn
        if self.left:
            # Copies, so that no session holds on to a whole batch.
            self.outputs.append(outputs.copy())
            self.states, self.native = (states.copy(), None) if native is None else (states, native)
            self._lane.put(self)
            return
        if self.outputs:
            outputs = np.concatenate([*self.outputs, outputs], axis=1)
        self.outcome.set_results(self.rows, outputs, states, native)

    def fail(self, error: Exception) -> None:
        """Tells why it could not be run."""
        self.outcome.set_exception(self.rows, error)


class Extent(NamedTuple):
    """How much some chunks are that run together: ``rows`` of at most ``turn`` time steps, ``steps`` of them in all."""

    rows: int
    turn: int
    steps: int


def extent_of(items: Sequence[Chunk]) -> Extent:
    """That of the turns of some chunks, of which there is one at the least."""
    if len(items) == 1:
        item = items[0]
        return tuple_of(Extent, (item.size, item.turn, item.size * item.turn))
    return Extent(rows_of(items), max([item.turn for item in items]), sum([item.turn * item.size for item in items]))


def gather(items: Sequence[Chunk], bucket: tuple[int, int], version: ModelVersion) -> StepBatch:
    """Pads the turns of some chunks to ``(rows, steps)``: one copy in for each row.

    None where a chunk is all there is, and its states are what the executor has answered before.
    """
    rows, steps = bucket
    first = items[0]
    origins: tuple[object, ...] = ()
    if first.origin is not None or len(items) > 1:
        origins = tuple(itertools.chain.from_iterable([(item.origin,) * item.size for item in items]))
    if first.native is not None and first.size == rows and not isinstance(first.states, list):
        batch = batch_of(first.states, first.native, steps, version.input_dim, origins)
        batch.lengths[:] = first.turn
        first.gather_inputs(batch.inputs)
        return batch
    batch = empty_batch(rows, steps, version.input_dim, version.state_size, origins)
    used = _gather_singles(items, batch) if len(items) > 1 else 0
    if not used:
        for item in items:
            begin, used = used, used + item.size
            batch.lengths[begin:used] = item.turn
            item.gather_inputs(batch.inputs[begin:used])
            item.gather_states(batch.state[begin:used], batch.reset[begin:used])
    if used < rows:
        # Padding rows step nothing; the initial state is one that every model can be relied on to handle.
        batch.reset[used:] = True
        batch.state[used:] = 0
    return batch


def _gather_singles(items: Sequence[Chunk], batch: StepBatch) -> int:
    """Copies chunks of one row each, with a state and as many time steps, all of them at once.

    That is what single steps of many connections are. Returns how many they are; 0 where one is not like that.
    """
    turn = items[0].turn
    inputs: list[FloatArray] = []
    states: list[FloatArray] = []
    for item in items:
        its_states = item.states
        # As long as its turn: none of it has run before.
        if item.size != 1 or item.turn != turn or item.inputs.shape[1] != turn or not isinstance(its_states, list):
            return 0
        state = its_states[0]
        if state is None:
            return 0
        inputs.append(item.inputs)
        states.append(state)
    count = len(items)
    np.concatenate(inputs, out=batch.inputs[:count, :turn])
    np.concatenate(states, out=batch.state[:count].reshape(-1))
    batch.lengths[:count] = turn
    return count


def rows_of(items: Sequence[Chunk]) -> int:
    """How many rows they have together."""
    return sum([item.size for item in items])


def halves_of(items: Sequence[Chunk]) -> tuple[list[Chunk], list[Chunk]]:
    """Half of the rows of some chunks, and the other half."""
    room = rows_of(items) // 2
    first: list[Chunk] = []
    second: list[Chunk] = []
    for item in items:
        if item.size <= room:
            first.append(item)
            room -= item.size
            continue
        if room:
            first.append(item.split(room))
            room = 0
        second.append(item)
    return first, second
