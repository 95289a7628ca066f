"""What a commit waits for before it is answered: docs/durability.md says what each setting may lose."""

import re
from typing import NamedTuple

_TEXT = re.compile(r"(?P<aof>aof)?(?:(?(aof),)replicas=(?P<replicas>[1-9]\d?))?")


class Durability(NamedTuple):
    """How far a write must have come.

    Attributes:
        aof: It is on the primary's disk (``WAITAOF``); with replicas, on theirs too.
        replicas: This many replicas have it (``WAIT``).
    """

    aof: bool = False
    replicas: int = 0

    @classmethod
    def parse(cls, text: str) -> "Durability":
        """Reads ``server`` (wait for nothing), ``aof``, ``replicas=N`` or ``aof,replicas=N``.

        Raises:
            ValueError: it is none of these.
        """
        match = None if text == "" else _TEXT.fullmatch(text)
        if text == "server":
            return cls()
        if match is None:
            raise ValueError(f"expected 'server', 'aof', 'replicas=N' or 'aof,replicas=N'; got {text!r}")
        return cls(aof=match["aof"] is not None, replicas=int(match["replicas"] or 0))

    def __bool__(self) -> bool:
        return self.aof or self.replicas > 0

    def command(self, timeout_ms: int) -> tuple[str | int, ...]:
        """What asks for it, after a write on the same connection."""
        if self.aof:
            return ("WAITAOF", 1, self.replicas, timeout_ms)
        return ("WAIT", self.replicas, timeout_ms)

    def reached(self, answer: object) -> bool:
        """Whether the server's answer to ``command`` says that it is so."""
        if self.aof:
            return isinstance(answer, list) and answer[0] >= 1 and answer[1] >= self.replicas
        return isinstance(answer, int) and answer >= self.replicas
