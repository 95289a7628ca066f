"""Steps that stay together from the call that asks for them to their answers: one object for all of them.

They are the steps of one ``step_many``: of different sessions, none of which has a step under way or a failure that may
not have been seen, with inputs of one shape. Then nothing has to be known of each but its session, its position and, in
the end, its outputs. Whatever else happens (a refusal, a lost stream, a deadline, an answer that makes no sense) turns
the block into the ``Step``s that it stands for, as if they had been asked for one by one: the rules are theirs.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from service.client.errors import GatewayError
from service.client.steps import STEP_OVERHEAD, Line, Step
from service.client.wire import LITTLE_FLOAT32, FloatArray


class Block:
    """The steps of one call, in the caller's order.

    Args:
        lines: The session of each; at least one.
        inputs: What each is stepped with, float32. Copied, so that the caller may write to it again.
        deadline: When the caller stops waiting, on the pipeline's clock.
        done: Called once, outside of any lock, when all have their outcome.

    Attributes:
        shape: ``[time, input_dim]`` of each, where they are alike.
        content: The inputs of all, one after the other, where they are alike.
        begins: Where each begins, once its session was taken (``occupy``).
        ends: Where each ends, likewise.
        name: What its request ids begin with.
        request_ids: Of each, once they are given; they are sent once at the most.
        stream: The stream on which it was sent; 0 before.
    """

    __slots__ = (
        "_answered",
        "_outputs",
        "_steps",
        "begins",
        "content",
        "deadline",
        "done",
        "ends",
        "left",
        "lines",
        "name",
        "request_ids",
        "shape",
        "size",
        "stream",
    )
    traceparent = ""  # a step that is traced goes by itself

    def __init__(
        self, lines: Sequence[Line], inputs: Sequence[FloatArray], deadline: float, done: Callable[[Any], None]
    ) -> None:
        self.lines = lines
        self.deadline = deadline
        self.done = done
        self.name = ""
        self.stream = 0
        self.begins: list[int] = []
        self.ends: list[int] = []
        self.request_ids: list[str] = []
        self.left = len(lines)
        self._answered = bytearray(self.left)
        self._outputs: list[FloatArray | None] = [None] * self.left
        self._steps: list[Step] | None = None
        shapes = [array.shape for array in inputs]
        self.shape = shapes[0]
        self.content = b""
        if len(self.shape) == 2 and shapes.count(self.shape) == len(shapes) > 1:
            self.content = _joined(inputs)
        self.size = len(self.content) + STEP_OVERHEAD * self.left
        if not self.content:  # of different shapes, or empty
            ended = Countdown(self.left, done)
            self._steps = [Step(line, array, deadline, ended.done) for line, array in zip(lines, inputs, strict=True)]

    @property
    def finished(self) -> bool:
        """Whether there is nothing more to do for it: its outcome is there, or that of its steps is waited for."""
        return self._steps is not None or not self.left

    def occupy(self, name: str) -> bool:
        """Makes it the step under way of all its sessions, and gives it its request ids.

        Returns:
            False if it is not to be, and nothing has changed: a session is not free, or comes twice.
        """
        lines, length = self.lines, self.shape[0]
        self.begins = [line.position for line in lines]
        for taken, line in enumerate(lines):
            if line.active is not None or line.failure is not None or line.closed:
                for other in lines[:taken]:
                    other.active, other.tail = None, other.position
                return False
            line.active = self
            line.tail += length
        self.ends = [begin + length for begin in self.begins]
        self.name = name
        self.request_ids = [name + row for row in _rows(len(lines))]
        return True

    def matching(self, names: Sequence[str], ends: Sequence[int], at: int) -> tuple[int, int]:
        """Which of its steps a row of results answers, and how many more the rows after it do, one by one.

        Args:
            names: Request ids that came.
            ends: The positions that came with them.
            at: Which of them to look at.

        Returns:
            The first step, and the number of steps from it on whose answers these are: not answered before, with the
            ends that they should have. 0 if it answers none.
        """
        row = names[at].partition(".")[2]
        first = int(row) if row.isdecimal() and len(row) < 9 else len(self.lines)
        count = min(len(names) - at, len(self.lines) - first)
        if count <= 0:
            return 0, 0
        last = first + count
        if (
            self.request_ids[first:last] == names[at : at + count]
            and self.ends[first:last] == ends[at : at + count]
            and self._answered.find(1, first, last) < 0
        ):
            return first, count
        ours = zip(self.request_ids[first:last], self.ends[first:last], self._answered[first:last], strict=True)
        came = zip(names[at:], ends[at:], strict=True)
        pairs = zip(ours, came, strict=False)
        fit = itertools.takewhile(lambda pair: pair[0] == (*pair[1], 0), pairs)
        return first, sum(1 for _ in fit)

    def settle(self, first: int, outputs: FloatArray) -> list[Line]:
        """Takes results over.

        Args:
            first: The first step that they are of; the others follow it.
            outputs: ``[steps, time, output_dim]``. Copied.

        Returns:
            Those of the sessions in which other steps wait.
        """
        last = first + len(outputs)
        self._outputs[first:last] = list(outputs.copy())
        self._answered[first:last] = b"\1" * len(outputs)
        self.left -= len(outputs)
        waiting = []
        for line, end in zip(self.lines[first:last], self.ends[first:last], strict=True):
            line.position = end
            line.active = None
            if line.waiting:
                waiting.append(line)
        return waiting

    def split(self) -> list[Step]:
        """The steps that it stands for, each as far as it has got; always the same ones."""
        if self._steps is None:
            ended = Countdown(self.left, self.done)
            inputs = np.frombuffer(self.content, LITTLE_FLOAT32).reshape(len(self.lines), *self.shape)
            self._steps = [
                Step(line, array, self.deadline, ended.done) for line, array in zip(self.lines, inputs, strict=True)
            ]
            taken = zip(self._steps, self.begins, self.request_ids, self._outputs, strict=False)  # none before
            for step, begin, name, outputs in taken:
                step.position, step.request_id, step.stream, step.outputs = begin, name, self.stream, outputs
        return self._steps

    def mark_seen(self) -> None:
        """Says that the caller knows how they ended."""
        for step in self._steps or ():
            step.mark_seen()

    def outcomes(self) -> Sequence[FloatArray | GatewayError | None]:
        """``[time, output_dim]`` of each, or what went wrong with it.

        Results that came together are views of one array that is this block's alone: its caller may write to each, and
        what keeps one keeps the others of the same call.
        """
        if self._steps is None:
            return self._outputs
        return [step.outputs if step.error is None else step.error for step in self._steps]

    def results(self) -> Sequence[FloatArray | None]:
        """``[time, output_dim]`` of each, as ``outcomes`` has them.

        Raises:
            GatewayError: what went wrong with the first that failed.
        """
        if self._steps is None:
            return self._outputs
        return [step.result() for step in self._steps]


def together(
    lines: Sequence[Line], inputs: Sequence[FloatArray], deadline: float, done: Callable[[Any], None]
) -> Step | Block:
    """The steps of one call, as ``Block`` has them; one by itself is a step like any other."""
    if len(lines) == 1:
        return Step(lines[0], inputs[0], deadline, done)
    return Block(lines, inputs, deadline, done)


class Countdown:
    """Calls back once some number of steps have their outcome.

    Args:
        size: How many.
        then: Called with the last of them.
    """

    def __init__(self, size: int, then: Callable[[Any], None]) -> None:
        self._size = size
        self._then = then
        self._ended = itertools.count(1)

    def done(self, step: object) -> None:
        """One of them has its outcome. Any thread may say so."""
        if next(self._ended) == self._size:  # one action, so that no lock is needed
            self._then(step)


def _joined(inputs: Sequence[FloatArray]) -> bytes:
    arrays: Sequence[Any] = inputs  # which are buffers, as NumPy's types do not say
    try:
        return b"".join(arrays)
    except TypeError:  # one is not contiguous
        return b"".join([array.tobytes() for array in inputs])


@lru_cache(maxsize=16)
def _rows(count: int) -> tuple[str, ...]:
    """How the request ids of so many steps end."""
    return tuple(f".{row}" for row in range(count))
