"""Admission: how much the gateway takes on at once. Nothing in it queues without a permit."""

import asyncio
from collections import Counter
from types import TracebackType

from service.errors import Draining, Overloaded


class Admission:
    """Counts the steps that were taken on and not yet answered, and the bytes of their inputs.

    Args:
        max_steps: How many steps may be under way at once.
        max_bytes: How many bytes of inputs they may hold together.
    """

    def __init__(self, *, max_steps: int, max_bytes: int) -> None:
        self._max_steps = max_steps
        self._max_bytes = max_bytes
        self._steps = 0
        self._bytes = 0
        self._by_owner: Counter[str] = Counter()  # of owners with a limit, those with steps under way
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def steps(self) -> int:
        """Steps under way now."""
        return self._steps

    @property
    def nbytes(self) -> int:
        """Bytes of their inputs."""
        return self._bytes

    def permit(self, nbytes: int, owner: str = "", owner_limit: int | None = None) -> "_Permit":
        """``with admission.permit(...):`` holds a place for one step, from its beginning to its end.

        Args:
            nbytes: Bytes of its inputs.
            owner: Whose step it is.
            owner_limit: The most steps that ``owner`` may have under way; None for no limit of its own.

        Raises:
            Draining: the gateway takes nothing new.
            Overloaded: there are as many steps or bytes as it takes, or as many steps as the owner may have.
        """
        return _Permit(self, nbytes, owner, owner_limit)

    def take(self, nbytes: int, owner: str, owner_limit: int | None) -> None:
        """A permit's beginning."""
        self._check(nbytes)
        if owner_limit is not None:
            if self._by_owner[owner] >= owner_limit:
                raise Overloaded(
                    f"{self._by_owner[owner]} steps of this caller are under way; at most {owner_limit} are taken",
                    limit=owner_limit,
                )
            self._by_owner[owner] += 1
        self._steps += 1
        self._bytes += nbytes
        self._idle.clear()

    def give_back(self, nbytes: int, owner: str, owner_limit: int | None) -> None:
        """A permit's end."""
        self._steps -= 1
        self._bytes -= nbytes
        if owner_limit is not None:
            self._by_owner[owner] -= 1
            if not self._by_owner[owner]:
                del self._by_owner[owner]
        if not self._steps:
            self._idle.set()

    def drain(self) -> None:
        """Takes nothing new from now on."""
        self._draining = True

    async def idle(self) -> None:
        """Returns once no step is under way."""
        await self._idle.wait()

    def check_open(self) -> None:
        """Raises ``Draining`` where nothing new is taken."""
        if self._draining:
            raise Draining("this gateway is shutting down; another one will take the request")

    def _check(self, nbytes: int) -> None:
        self.check_open()
        if self._steps >= self._max_steps:
            raise Overloaded(
                f"{self._steps} steps are under way; at most {self._max_steps} are taken", limit=self._max_steps
            )
        # A chunk that fits the message limit must be able to run alone, whatever the byte limit is.
        if self._steps and self._bytes + nbytes > self._max_bytes:
            raise Overloaded(
                f"the steps under way hold {self._bytes} bytes of inputs; at most {self._max_bytes} are taken",
                limit=self._max_bytes,
            )


class _Permit:
    """One step's place. A class and not a generator: it is made for every step."""

    __slots__ = ("_admission", "_nbytes", "_owner", "_owner_limit")

    def __init__(self, admission: Admission, nbytes: int, owner: str, owner_limit: int | None) -> None:
        self._admission = admission
        self._nbytes = nbytes
        self._owner = owner
        self._owner_limit = owner_limit

    def __enter__(self) -> None:
        self._admission.take(self._nbytes, self._owner, self._owner_limit)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.give_back(self._nbytes, self._owner, self._owner_limit)
