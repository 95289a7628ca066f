"""Admission: how much the gateway takes on at once. Nothing in it queues without a permit."""

import asyncio
from types import TracebackType

from service.errors import Draining, Overloaded

# Of the places and of the bytes, what is kept for callers who hold less than half of all.
_KEPT = 0.1


class Admission:
    """Counts the steps that were taken on and not yet answered, and the bytes of their inputs.

    A tenth of the places and of the bytes is out of reach for a caller who holds half of them: a single one that floods
    leaves room for the others.

    Args:
        max_steps: How many steps may be under way at once.
        max_bytes: How many bytes of inputs they may hold together.
    """

    def __init__(self, *, max_steps: int, max_bytes: int) -> None:
        self._max_steps = max_steps
        self._max_bytes = max_bytes
        self._common_steps = max_steps - int(_KEPT * max_steps)
        self._common_bytes = max_bytes - int(_KEPT * max_bytes)
        self._steps = 0
        self._bytes = 0
        self._held: dict[str, _Held] = {}  # by callers who have steps under way
        self._draining = False
        self._idle = asyncio.Event()  # while it is not set, somebody waits for it
        self._idle.set()

    @property
    def steps(self) -> int:
        """Steps under way now."""
        return self._steps

    @property
    def nbytes(self) -> int:
        """Bytes of their inputs."""
        return self._bytes

    def permit(self, nbytes: int, caller: str = "", limit: int | None = None) -> "_Permit":
        """``with admission.permit(...):`` holds a place for one step, from its beginning to its end.

        Args:
            nbytes: Bytes of its inputs.
            caller: Whose step it is.
            limit: The most steps that ``caller`` may have under way; None for no limit of its own.

        Raises:
            Draining: the gateway takes nothing new.
            Overloaded: there are as many steps or bytes as it takes, or as many as this caller may have.
        """
        return _Permit(self, nbytes, caller, limit)

    def take(self, nbytes: int, caller: str, limit: int | None, steps: int = 1) -> None:
        """A permit's beginning, or that of so many steps at once, of ``nbytes`` together: all of them or none."""
        if self._draining:
            self.check_open()
        held = self._held.get(caller)
        if self._steps + steps > self._common_steps or self._bytes + nbytes > self._common_bytes:
            self._check_room(nbytes, held or _NONE, steps)
        if held is None:
            held = self._held[caller] = _Held()
        if limit is not None and held.steps + steps > limit:
            self._forget_idle(caller, held)
            raise Overloaded(f"{held.steps} steps of this caller are under way; at most {limit} are taken", limit=limit)
        held.steps += steps
        held.bytes += nbytes
        self._steps += steps
        self._bytes += nbytes

    def give_back(self, nbytes: int, caller: str, steps: int = 1) -> None:
        """A permit's end, or that of some of the steps that were taken at once."""
        held = self._held[caller]
        held.steps -= steps
        held.bytes -= nbytes
        self._forget_idle(caller, held)
        self._steps -= steps
        self._bytes -= nbytes
        if not (self._steps or self._idle.is_set()):
            self._idle.set()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        self._draining = True

    async def idle(self) -> None:
        """Returns once no step is under way."""
        while self._steps:
            self._idle.clear()
            await self._idle.wait()

    def check_open(self) -> None:
        """Raises ``Draining`` where nothing new is taken."""
        if self._draining:
            raise Draining("this gateway is shutting down; another one will take the request")

    def _forget_idle(self, caller: str, held: "_Held") -> None:
        if not held.steps:
            del self._held[caller]

    def _check_room(self, nbytes: int, held: "_Held", steps: int) -> None:
        """Decides over what is left when the common part is used up."""
        # As if they were taken one after the other.
        greedy = 2 * (held.steps + steps - 1) >= self._max_steps
        if self._steps + steps > (self._common_steps if greedy else self._max_steps):
            raise Overloaded(
                f"{self._steps} steps are under way; at most {self._max_steps} are taken"
                + (f", {self._common_steps} while {held.steps} of them are this caller's" if greedy else ""),
                limit=self._max_steps,
            )
        greedy = 2 * (held.bytes + nbytes - nbytes // steps) >= self._max_bytes
        # A chunk that fits the message limit must be able to run alone, whatever the byte limit is.
        if self._steps + steps > 1 and self._bytes + nbytes > (self._common_bytes if greedy else self._max_bytes):
            raise Overloaded(
                f"the steps under way hold {self._bytes} bytes of inputs; at most {self._max_bytes} are taken"
                + (f", {self._common_bytes} while {held.bytes} of them are this caller's" if greedy else ""),
                limit=self._max_bytes,
            )


class _Held:
    """What one caller has under way."""

    __slots__ = ("bytes", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.bytes = 0


_NONE = _Held()


class _Permit:
    """One step's place. A class and not a generator: it is made for every step."""

    __slots__ = ("_admission", "_caller", "_limit", "_nbytes")

    def __init__(self, admission: Admission, nbytes: int, caller: str, limit: int | None) -> None:
        self._admission = admission
        self._nbytes = nbytes
        self._caller = caller
        self._limit = limit

    def __enter__(self) -> None:
        self._admission.take(self._nbytes, self._caller, self._limit)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.give_back(self._nbytes, self._caller)
