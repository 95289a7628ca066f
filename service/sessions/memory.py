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
    TellOne,
    Told,
    draw_tokens,
    judge,
    new_token,
    new_tokens,
)
from service.sessions.cohort import Cohort, Commits
from service.types import FloatArray, SessionKey, VersionKey, tuple_of

# Fewer sessions are kept as one only once the same were stepped together twice in a row, and are stepped as one only by
# themselves: each cohort costs as much as the steps of a few sessions.
_LARGE_COHORT = 16


class MemoryStore:
    """A dictionary of immutable sessions. Those that were stepped together are in it as one value, a ``Cohort``.

    Of a cohort either all its sessions are there as part of it, or none: whatever is done to one alone makes each of
    them a ``Session`` again.

    No method suspends, so each is atomic on its event loop, and a reader may keep the session that it got.

    Args:
        max_sessions: How many sessions it keeps.
        clock: Seconds since the epoch.
        large_cohort: So many sessions that were stepped together are kept as one at once.
    """

    def __init__(
        self,
        *,
        max_sessions: int,
        clock: Callable[[], float],
        large_cohort: int = _LARGE_COHORT,
    ) -> None:
        self._max_sessions = max_sessions
        self._clock = clock
        self._large_cohort = large_cohort
        # Of sessions by themselves that came first in a small company, whose: it may come again.
        self._companies: dict[SessionKey, list[str]] = {}
        self._sessions: dict[SessionKey, Session | Cohort] = {}
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

    def cohorts_now(self, principal: str, session_ids: Sequence[str], seconds: float) -> Sequence[tuple[int, Cohort]]:
        """See ``LocalStore.cohorts_now``."""
        found: list[tuple[int, Cohort]] = []
        until, get, count = self._clock() + seconds, self._sessions.get, len(session_ids)
        least = min(count, self._large_cohort)
        at = 0
        while at <= count - least:
            cohort = get(tuple_of(SessionKey, (principal, session_ids[at])))
            at += 1
            if not isinstance(cohort, Cohort) or len(cohort) < least or cohort.expires < until:
                continue
            last = at - 1 + len(cohort)
            if cohort.session_ids == session_ids[at - 1 : last]:
                found.append((at - 1, cohort))
                at = last
        return found

    def load_now(self, keys: Sequence[SessionKey]) -> Sequence[Session | None]:
        """See ``LocalStore.load_now``."""
        now = self._clock()
        found = [self._alone(key) for key in keys]
        return [session if session is not None and session.expires > now else None for session in found]

    async def extend(self, key: SessionKey, seconds: float) -> None:
        """See ``SessionStore.extend``."""
        self.extend_now([self._alone(key)], seconds)

    def extend_now(self, sessions: Sequence[Session | None], seconds: float) -> Sequence[Session | None]:
        """See ``LocalStore.extend_now``."""
        until = self._clock() + seconds
        for session in sessions:
            if session is not None and session.expires < until:
                self._sessions[session.info.key] = session._replace(expires=until)
        return sessions

    async def commit(self, key: SessionKey, commit: Commit) -> Committed | Refused:
        """See ``SessionStore.commit``."""
        self._require(key)
        session = self._alone(key)
        if session is None:
            raise _not_found(key)
        outcome = self._commit(session, commit, new_token(), self._clock())
        return outcome if isinstance(outcome, Refused) else Committed(outcome)

    def commit_soon(self, sessions: Sequence[Session], commits: Commits, tell: Tell) -> None:
        """See ``LocalStore.commit_soon``."""
        now = self._clock()
        if isinstance(sessions, Cohort) or self._stay_together(sessions):
            cohort = self._commit_together(sessions, commits, now)
            if cohort is not None:
                tell(cohort)
                return
        told: list[Told] = []
        for at, (before, token) in enumerate(zip(sessions, new_tokens(len(commits)), strict=True)):
            session = self._alone(before.info.key)
            if session is None or session.expires <= now:
                told.append(_not_found(before.info.key))
            else:
                told.append(self._commit(session, commits.of(at, before), token, now))
        tell(told)

    def at_hand(self, key: SessionKey, seconds: float) -> Session | None:
        """See ``LocalStore.at_hand``."""
        session = self._alone(key)
        now = self._clock()
        if session is None or session.expires <= now:
            return None
        if session.expires < now + seconds:
            self._sessions[key] = session._replace(expires=now + seconds)
        return session

    def commit_one_soon(self, session: Session, commit: Commit, tell: TellOne) -> None:
        """See ``LocalStore.commit_one_soon``."""
        key, now = session.info.key, self._clock()
        there = self._alone(key)
        if there is None or there.expires <= now:
            tell(_not_found(key))
        else:
            tell(self._commit(there, commit, draw_tokens(1), now))

    def _stay_together(self, sessions: Sequence[Session]) -> bool:
        """Whether sessions that were stepped together are worth a cohort."""
        if len(sessions) >= self._large_cohort:
            return True
        company = [session.info.key.session_id for session in sessions]
        first = sessions[0].info.key
        if self._companies.pop(first, None) == company:
            return True
        self._companies[first] = company
        return False

    def _commit_together(self, sessions: Sequence[Session], commits: Commits, now: float) -> Cohort | None:
        """Writes commits as those of a cohort; None, and nothing is written, where not all of them are to be."""
        there = self._sessions
        if isinstance(sessions, Cohort):
            if there.get(sessions.keys[0]) is not sessions or sessions.expires <= now:
                return None
            cohort = sessions.after(commits, now)
        else:
            # The very same, not one of the same token: one whose life was made longer by itself is kept by itself.
            if not all(there.get(session.info.key) is session and session.expires > now for session in sessions):
                return None
            cohort = Cohort.of(sessions, commits, now)
        there.update(dict.fromkeys(cohort.keys, cohort))
        return cohort

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
            key = SessionKey(principal, ids[at])
            s = self._sessions[key]
            if isinstance(s, Cohort):
                summary = s.summary(key)
            else:
                summary = SessionSummary(s.info, s.position, s.last_used, s.expires)
            if summary.expires > now:
                found.append(summary)
        return found

    async def counts(self) -> dict[VersionKey, int]:
        """See ``SessionStore.counts``."""
        now = self._clock()
        self._part_expired(now)
        return dict(Counter(session.info.version for session in self._sessions.values() if session.expires > now))

    async def sweep(self) -> Sequence[SessionKey]:
        """See ``SessionStore.sweep``."""
        now = self._clock()
        self._part_expired(now)
        expired = [key for key, session in self._sessions.items() if session.expires <= now]
        for key in expired:
            del self._sessions[key]
            self._companies.pop(key, None)
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
        self._companies.clear()

    def _live(self, key: SessionKey, now: float) -> Session | None:
        """A session; of a cohort by itself, which stays as it is."""
        session = self._sessions.get(key)
        if isinstance(session, Cohort):
            session = session.session(key)
        if session is None or session.expires > now:
            return session
        self._remove(key)
        return None

    def _alone(self, key: SessionKey) -> Session | None:
        """A session to which something is to be done alone; it may have expired."""
        session = self._sessions.get(key)
        if isinstance(session, Cohort):
            self._part(session)
            return self._alone(key)
        return session

    def _part(self, cohort: Cohort) -> None:
        """Makes each of a cohort a session by itself."""
        self._sessions.update(zip(cohort.keys, cohort, strict=True))

    def _part_expired(self, now: float) -> None:
        """Likewise of the cohorts of which at least one has expired."""
        kept = self._sessions.values()
        for cohort in {id(one): one for one in kept if isinstance(one, Cohort) and one.expires <= now}.values():
            self._part(cohort)

    def _count(self, principal: str, now: float) -> int:
        """One owner's live sessions."""
        keys = [SessionKey(principal, name) for name in self._ids.get(principal, ())]
        kept = self._sessions
        return sum((one.summary(key) if isinstance(one := kept[key], Cohort) else one).expires > now for key in keys)

    def _remove(self, key: SessionKey) -> None:
        self._alone(key)
        del self._sessions[key]
        self._companies.pop(key, None)
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
