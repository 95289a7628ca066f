"""Copies of sessions in this gateway, bounded by bytes. A copy is a guess: each commit checks its token."""

from collections import OrderedDict

from service.sessions import Session
from service.types import SessionKey

# What a session takes beside its arrays, roughly.
_OVERHEAD_BYTES = 1024


class SessionCache:
    """The least recently used goes first.

    Args:
        max_bytes: How much the copies may hold together; 0 keeps none.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._sessions: OrderedDict[SessionKey, Session] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """What the copies hold now."""
        return self._bytes

    def __len__(self) -> int:
        return len(self._sessions)

    def get(self, key: SessionKey) -> Session | None:
        """The copy, if there is one; it is used now."""
        session = self._sessions.get(key)
        if session is not None:
            self._sessions.move_to_end(key)
        return session

    def put(self, session: Session) -> None:
        """Keeps a copy in place of the one before."""
        self.drop(session.info.key)
        self._sessions[session.info.key] = session
        self._bytes += _size(session)
        while self._bytes > self._max_bytes:
            _, oldest = self._sessions.popitem(last=False)
            self._bytes -= _size(oldest)

    def drop(self, key: SessionKey) -> None:
        """Forgets a session."""
        session = self._sessions.pop(key, None)
        if session is not None:
            self._bytes -= _size(session)

    def clear(self) -> None:
        """Forgets all."""
        self._sessions.clear()
        self._bytes = 0


def _size(session: Session) -> int:
    state = session.state.nbytes if session.state is not None else 0
    reply = session.last.reply.outputs.nbytes if session.last is not None else 0
    return _OVERHEAD_BYTES + state + reply
