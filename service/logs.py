"""Logging: one line an event on standard error, for people on a terminal and as JSON elsewhere."""

import hashlib
import logging
import random
import sys
from collections.abc import Callable
from typing import Any, Literal

import structlog


def configure_logging(level: str, style: Literal["auto", "console", "json"]) -> None:
    """Sends the standard library's logging through structlog; call once, at start.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        style: ``console`` for people, ``json`` for programs; ``auto`` asks whether standard error is a terminal.
    """
    console = style == "console" or (style == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    last: list[Any] = (
        [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
        if console
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer()]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    # gRPC's own loggers tell of every broken connection; that is a client's everyday life.
    logging.getLogger("grpc").setLevel(logging.ERROR)


class RequestLog:
    """A line at level debug for each request, or for a share of them.

    It says what was called, by whom, how it ended and how long it took: never inputs, outputs, tokens or error texts,
    and of a session's id, which may be all that guards the session, a digest that tells sessions apart.

    Args:
        share: Of the requests, how many get a line: 0 to 1.
        draw: Random numbers of 0 to 1.
    """

    def __init__(self, share: float, draw: Callable[[], float] = random.random) -> None:
        self._share = share
        self._draw = draw
        self._log = logging.getLogger("service.requests")

    @property
    def on(self) -> bool:
        """Whether any request gets a line."""
        return self._log.isEnabledFor(logging.DEBUG)

    def wanted(self) -> bool:
        """Whether the request that is asked for gets a line."""
        return self.on and (self._share >= 1 or self._draw() < self._share)

    def write(self, rpc: str, *, code: str, seconds: float, session_id: str = "", **facts: object) -> None:
        """Writes the line."""
        session = hashlib.sha256(session_id.encode()).hexdigest()[:12] if session_id else ""
        known = {"rpc": rpc, "code": code, "ms": round(1e3 * seconds, 3), "session": session, **facts}
        self._log.debug("request", extra={name: value for name, value in known.items() if value != ""})
