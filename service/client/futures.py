"""What a step of the blocking client is waited for with."""

import threading
from concurrent.futures import Future

from service.client.blocks import Block
from service.client.errors import GatewayError
from service.client.steps import Step
from service.client.threads import StepThreads
from service.client.wire import FloatArray


class Turn:
    """Waits for a step, or a block of them: one wake-up of the waiting thread for all of it."""

    def __init__(self) -> None:
        self._done = threading.Lock()  # cheaper than an event, which is a condition around one
        self._done.acquire()

    def done(self, _: object) -> None:
        """The outcome is there. Called once; any thread may."""
        self._done.release()

    def run(self, step: Step | Block, threads: StepThreads) -> None:
        """Sends it and returns once all of it has its outcome. Interrupted, it gives up what has none."""
        threads.check_process()
        try:
            threads.submit(step)
            self._done.acquire()
        except BaseException:  # KeyboardInterrupt above all; it goes on up
            threads.cancel(step)
            step.mark_seen()
            raise


class StepFuture(Future[FloatArray]):
    """The outcome of ``session.step_async``: ``result()`` is ``[time, output_dim]`` or raises a ``GatewayError``.

    A session whose step failed takes no other step until this has been looked at, by ``result()`` or ``exception()``,
    here or on a step behind it: a caller who does not know of the failure would have the next step applied in its
    place. ``cancel()`` works until the outcome is there; a cancelled step may have been applied, as ``session.step``
    of the same inputs shows.
    """

    _step: Step
    _threads: StepThreads

    def track(self, step: Step, threads: StepThreads) -> None:
        """Says which step this is the future of."""
        self._step = step
        self._threads = threads

    def resolve(self, step: Step) -> None:
        """Takes the step's outcome over."""
        if not self.set_running_or_notify_cancel():
            return
        if step.error is not None:
            self.set_exception(step.error)
        else:
            self.set_result(step.result())

    def result(self, timeout: float | None = None) -> FloatArray:
        """The outputs ``[time, output_dim]``; waits for them, ``timeout`` seconds at the most.

        Raises:
            GatewayError: what went wrong with the step.
            TimeoutError: the outcome is not there yet; the step goes on.
            concurrent.futures.CancelledError: the step was cancelled here.
        """
        try:
            return super().result(timeout)
        except GatewayError:
            self._step.mark_seen()
            raise

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What went wrong, or None; waits as ``result`` does."""
        error = super().exception(timeout)
        self._step.mark_seen()
        return error

    def cancel(self) -> bool:
        """Gives the step up, unless its outcome is there already."""
        if not super().cancel():
            return False
        self._threads.cancel(self._step)
        self._step.mark_seen()
        return True
