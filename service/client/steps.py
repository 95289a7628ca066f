"""One step on its way, and the line of steps that a session is."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import grpc

from service.client.errors import GatewayError, PrecedingStepFailed
from service.client.wire import FloatArray

if TYPE_CHECKING:
    from service.client.blocks import Block

# Bytes that a step takes in a message beside the contents of its inputs: ids, shape, position, tags.
STEP_OVERHEAD = 160


class Step:
    """One step, from the caller's hand to its outcome: ``outputs`` or ``error``.

    Args:
        line: The session that it steps.
        inputs: ``[time, input_dim]``, float32. Copied, so that the caller may write to it again.
        deadline: When its caller stops waiting, on the pipeline's clock.
        done: Called once with the step when it has its outcome, outside of any lock.
    """

    __slots__ = (
        "attempts",
        "content",
        "deadline",
        "done",
        "error",
        "failure",
        "length",
        "line",
        "outputs",
        "position",
        "request_id",
        "shape",
        "size",
        "span",
        "stream",
        "traceparent",
    )

    def __init__(self, line: "Line", inputs: FloatArray, deadline: float, done: Callable[[Any], None]) -> None:
        self.line = line
        self.shape = inputs.shape
        self.length = inputs.shape[0] if inputs.ndim else 0
        self.content = inputs.tobytes()
        self.size = len(self.content) + STEP_OVERHEAD
        self.deadline = deadline
        self.done = done
        self.position = 0
        self.attempts = 0
        self.request_id = ""
        self.stream = 0
        self.outputs: FloatArray | None = None
        self.error: GatewayError | None = None
        self.failure: Failure | None = None
        self.span: object = None
        self.traceparent = ""

    @property
    def finished(self) -> bool:
        """Whether it has its outcome."""
        return self.outputs is not None or self.error is not None

    def same_as(self, other: "Step") -> bool:
        """Whether it would be the same step, were it sent from the same position."""
        return self.content == other.content and self.shape == other.shape

    def mark_seen(self) -> None:
        """Says that the caller knows how it ended."""
        if self.failure is not None:
            self.failure.seen = True

    def result(self) -> FloatArray:
        """``[time, output_dim]``, to a caller who knows from now on how it ended.

        Raises:
            GatewayError: what went wrong with it.
        """
        self.mark_seen()
        if self.error is not None:
            raise self.error
        if self.outputs is None:
            raise AssertionError("the step has no outcome yet")
        return self.outputs

    def results(self) -> Sequence[FloatArray]:
        """``result``, as a block of steps has it of each."""
        return [self.result()]

    def outcomes(self) -> Sequence[FloatArray | GatewayError | None]:
        """``[time, output_dim]``, or what went wrong with it, likewise."""
        return [self.outputs if self.error is None else self.error]


class Failure:
    """A step of a session failed, and with it those behind it.

    Until the caller has seen it, its session takes nothing but the same step again: another one, asked for by a caller
    who does not know, would be applied in the failed one's place.

    Attributes:
        step: The step that failed.
        error: What went wrong with it.
        seen: Whether the caller has looked at the outcome of it, or of one behind it.
    """

    __slots__ = ("error", "seen", "step")

    def __init__(self, step: Step, error: GatewayError) -> None:
        self.step = step
        self.error = error
        self.seen = False

    def behind(self) -> PrecedingStepFailed:
        """The error of a step that comes after the failed one."""
        error = PrecedingStepFailed(
            grpc.StatusCode.ABORTED,
            f"the step was not sent: it comes after the step at position {self.step.position} of session "
            f"{self.step.line.session_id!r}, which failed: {self.error}",
            reason="PRECEDING_STEP_FAILED",
        )
        error.__cause__ = self.error
        return error


class Line:
    """A session's steps, in order: one is on its way, the others wait for it.

    Attributes:
        position: Time steps that the session has consumed, as far as the gateway has told this client.
        tail: Where the next step will begin: ``position`` and what is on its way or waits.
        active: The step on its way, or the block that it is in; None where there is none.
        waiting: The steps behind it.
        failure: What failed last, until its caller knows and goes on.
        closed: Why no step is taken any more; empty while steps are taken.
    """

    __slots__ = ("active", "closed", "failure", "position", "session_id", "tail", "waiting")

    def __init__(self, session_id: str, position: int) -> None:
        self.session_id = session_id
        self.position = self.tail = position
        self.active: Step | Block | None = None
        self.waiting: deque[Step] = deque()
        self.failure: Failure | None = None
        self.closed = ""
