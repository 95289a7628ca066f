"""Who calls: the principal of the call that is being answered."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Somebody who may call, and how much.

    Attributes:
        name: Sessions belong to it.
        models: The models that it may use and see; None for all.
        max_sessions: The most sessions it may keep; None for as many as the gateway keeps.
        max_queued_steps: The most steps it may have under way; None for as many as the gateway takes.
    """

    name: str
    models: frozenset[str] | None = None
    max_sessions: int | None = None
    max_queued_steps: int | None = None

    def may_use(self, model: str) -> bool:
        """Whether it may use, and see, a model."""
        return self.models is None or model in self.models


# Everybody, where the gateway asks for no credentials.
ANONYMOUS = Principal(name="anonymous")

_caller: ContextVar[Callable[[], Principal]] = ContextVar("caller")
_connection: ContextVar[str] = ContextVar("connection", default="")


def set_caller(caller: Callable[[], Principal], connection: str = "") -> None:
    """For the rest of this call.

    Args:
        caller: Asked anew each time, so that a revoked token ends a stream's steps.
        connection: Names the connection that it came by, where that is all that tells this caller from others.
    """
    _caller.set(caller)
    _connection.set(connection)


def current_connection() -> str:
    """What tells this call's caller from others of the same principal; empty where nothing has to."""
    return _connection.get()


def current() -> Principal:
    """The principal of this call.

    Raises:
        Unauthenticated: its credentials hold no more.
    """
    return _caller.get()()
