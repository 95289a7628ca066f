"""Sessions in this process's memory: the default. They are lost with the process."""

from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Callable, Sequence

from service.errors import SessionExists, SessionLimit, SessionNotFound
from service.sessions import (
    Commit,
    Committed,
    LastStep,
    Refused,
    Session,
    SessionInfo,
    SessionSummary,
    Tell,
    Told,
    judge,
    new_token,
    new_tokens,
)
from service.types import FloatArray, SessionKey, VersionKey, tuple_of


class MemoryStore:
    """A dictionary of immutable sessions.

    No method suspends, so each is atomic on its event loop, and a reader may keep the session that it got.

    Args:
        max_sessions: How many sessions it keeps.
        clock: Seconds since the epoch.
    """

    def __init__(self, *, max_sessions: int, clock: Callable[[], float]) -> None:
        self._max_sessions = max_sessions
        self._clock = clock
        self._sessions: dict[SessionKey, Session] = {}
        self._ids: dict[str, list[str]] = {}  # of each principal, sorted: a list of some must not look at all

    async def create(
        self,
        info: SessionInfo,
        *,
        state: FloatArray | None = None,
        position: int = 0,
        owner_limit: int | None = None,
    ) -> Session:
        """See ``SessionStore.create``."""
        now = self._clock()
        there = self._live(info.key, now)
        if there is not None:
            if there.info.create_digest == info.create_digest:
                return there
            raise SessionExists(
                f"session id {info.key.session_id!r} is taken by a session that another request made",
                session_id=info.key.session_id,
            )
        if owner_limit is not None and self._count(info.key.principal, now) >= owner_limit:
            raise SessionLimit(f"this caller may keep at most {owner_limit} sessions", limit=owner_limit)
        if len(self._sessions) >= self._max_sessions:
            await self.sweep()
            if len(self._sessions) >= self._max_sessions:
                raise SessionLimit(f"the gateway keeps at most {self._max_sessions} sessions", limit=self._max_sessions)
        session = Session(
            info=info._replace(created=now),
            position=position,
            state=state,
            last=None,
            token=new_token(),
            last_used=now,
            expires=now + info.ttl,
        )
        self._sessions[info.key] = session
        insort(self._ids.setdefault(info.key.principal, []), info.key.session_id)
        return session

    async def load(self, key: SessionKey, *, fresh: bool = False) -> Session:
        """See ``SessionStore.load``."""
        return self._require(key)

    def load_now(self, keys: Sequence[SessionKey]) -> Sequence[Session | None]:
        """See ``LocalStore.load_now``."""
        now, get = self._clock(), self._sessions.get
        found = [get(key) for key in keys]
        return [session if session is not None and session.expires > now else None for session in found]

    async def extend(self, key: SessionKey, seconds: float) -> None:
        """See ``SessionStore.extend``."""
        self.extend_now([self._sessions.get(key)], seconds)

    def extend_now(self, sessions: Sequence[Session | None], seconds: float) -> Sequence[Session | None]:
        """See ``LocalStore.extend_now``."""
        until = self._clock() + seconds
        for session in sessions:
            if session is not None and session.expires < until:
                self._sessions[session.info.key] = session._replace(expires=until)
        return sessions

    async def commit(self, key: SessionKey, commit: Commit) -> Committed | Refused:
        """See ``SessionStore.commit``."""
        session = self._require(key)
        outcome = self._commit(session, commit, new_token(), self._clock())
        return outcome if isinstance(outcome, Refused) else Committed(outcome)

    def commit_soon(self, sessions: Sequence[Session], commits: Sequence[Commit], tell: Tell) -> None:
        """See ``LocalStore.commit_soon``."""
        now, there = self._clock(), self._sessions
        told: list[Told] = []
        for before, commit, token in zip(sessions, commits, new_tokens(len(commits)), strict=True):
            session = there.get(before.info.key)
            if session is None or session.expires <= now:
                told.append(_not_found(before.info.key))
            else:
                told.append(self._commit(session, commit, token, now))
        tell(told)

    def _commit(self, session: Session, commit: Commit, token: bytes, now: float) -> Session | Refused:
        ran_on, position, begin, digest, state, reply = commit
        if session.token != ran_on:
            return Refused(judge(session, position, digest), session)
        info = session.info
        last = tuple_of(LastStep, (begin, digest, reply))
        after = tuple_of(Session, (info, reply.position, state, last, token, now, now + info.ttl))
        self._sessions[info.key] = after
        return after

    async def delete(self, key: SessionKey) -> None:
        """See ``SessionStore.delete``."""
        if key in self._sessions:
            self._remove(key)

    async def list_sessions(self, principal: str, *, after: str = "", limit: int) -> Sequence[SessionSummary]:
        """See ``SessionStore.list_sessions``."""
        now = self._clock()
        ids = self._ids.get(principal, [])
        found: list[SessionSummary] = []
        for at in range(bisect_right(ids, after), len(ids)):
            if len(found) == limit:
                break
            s = self._sessions[SessionKey(principal, ids[at])]
            if s.expires > now:
                found.append(SessionSummary(s.info, s.position, s.last_used, s.expires))
        return found

    async def counts(self) -> dict[VersionKey, int]:
        """See ``SessionStore.counts``."""
        now = self._clock()
        return dict(Counter(session.info.version for session in self._sessions.values() if session.expires > now))

    async def sweep(self) -> Sequence[SessionKey]:
        """See ``SessionStore.sweep``."""
        now = self._clock()
        expired = [key for key, session in self._sessions.items() if session.expires <= now]
        for key in expired:
            del self._sessions[key]
        for principal in {key.principal for key in expired}:
            left = [name for name in self._ids[principal] if SessionKey(principal, name) in self._sessions]
            self._ids[principal] = left
            if not left:
                del self._ids[principal]
        return expired

    async def close(self) -> None:
        """See ``SessionStore.close``."""
        self._sessions.clear()
        self._ids.clear()

    def _live(self, key: SessionKey, now: float) -> Session | None:
        session = self._sessions.get(key)
        if session is None or session.expires > now:
            return session
        self._remove(key)
        return None

    def _count(self, principal: str, now: float) -> int:
        """One owner's live sessions."""
        ids = self._ids.get(principal, ())
        return sum(self._sessions[SessionKey(principal, name)].expires > now for name in ids)

    def _remove(self, key: SessionKey) -> None:
        del self._sessions[key]
        ids = self._ids[key.principal]
        del ids[bisect_left(ids, key.session_id)]
        if not ids:
            del self._ids[key.principal]

    def _require(self, key: SessionKey) -> Session:
        session = self._live(key, self._clock())
        if session is None:
            raise _not_found(key)
        return session


def _not_found(key: SessionKey) -> SessionNotFound:
    return SessionNotFound(
        f"no session {key.session_id!r}: never opened, deleted or expired", session_id=key.session_id
    )
