"""The store that gateways share: sessions in a Valkey or Redis server (one primary, with replicas or Sentinel).

Every operation is one script, so it is carried out whole or not at all; a commit is one round trip, and a step whose
session is cached here needs no other. The server's clock is the only one.
"""

import asyncio
import contextlib
import functools
import logging
from collections.abc import Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from service.errors import (
    CommitUnknown,
    CorruptState,
    ServiceError,
    SessionExists,
    SessionLimit,
    SessionNotFound,
    StoreUnavailable,
)
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
    Verdict,
    blob,
    new_token,
)
from service.sessions.cohort import Cohort, Commits
from service.sessions.redis import scripts
from service.sessions.redis.cache import SessionCache
from service.sessions.redis.durability import Durability
from service.sessions.redis.endpoint import dialer
from service.sessions.redis.link import Argument, Barrier, ConnectionLost, Link, NoAnswer
from service.sessions.redis.records import (
    Keys,
    binding,
    keys_of,
    millis,
    read_record,
    read_summary,
    read_version,
)
from service.sessions.redis.scripts import Script
from service.types import FloatArray, SessionKey, VersionKey

_log = logging.getLogger(__name__)
_T = TypeVar("_T")

_SWEEP_AT_A_TIME = 1000


class RedisStore:
    """See ``SessionStore``. Nothing is connected before it is needed; a server that comes back is found again.

    Args:
        url: ``redis://``, ``rediss://``, ``unix://``, ``redis+sentinel://`` (``endpoint.py``).
        max_sessions: How many sessions all gateways together keep.
        prefix: What its keys begin with.
        durability: What a commit waits for: ``server``, ``aof``, ``replicas=N`` or ``aof,replicas=N``.
        timeout: Seconds that the server may take to answer; as many again to become durable.
        connect_timeout: Seconds that it may take to connect.
        cache_bytes: How much the copies of sessions in this process may hold.
        write_form: The form of ``blob.FORMS`` to write. Keep to the older until every gateway reads the newer.

    Raises:
        ValueError: one of these is none that it knows.
    """

    def __init__(
        self,
        url: str,
        *,
        max_sessions: int,
        prefix: str = "ntm:",
        durability: str = "server",
        timeout: float = 2.0,
        connect_timeout: float = 1.0,
        cache_bytes: int = 256 * 1024 * 1024,
        write_form: int = 1,
    ) -> None:
        if write_form not in blob.FORMS:
            raise ValueError(f"expected a form to write of {blob.FORMS}; got {write_form}")
        dial = dialer(url, connect_timeout=connect_timeout)
        reached = Durability.parse(durability)
        barrier = Barrier(f"{prefix}barrier", reached, timeout) if reached else None
        self._prefix = prefix
        self._max_sessions = max_sessions
        self._write_form = write_form
        self._index = (f"{prefix}expiry", f"{prefix}live")
        self._cache = SessionCache(cache_bytes)
        # Reads have a link of their own: they need not wait behind writes that wait for a disk.
        self._writes = Link(dial, timeout=timeout, connect_timeout=connect_timeout, barrier=barrier)
        self._reads = Link(dial, timeout=timeout, connect_timeout=connect_timeout)
        # What was read as of now must be as durable as a commit: it may be answered as a replay.
        self._fresh_reads = self._writes if barrier else self._reads
        self._under_way: set[asyncio.Future[Any]] = set()
        # The store's clock less the event loop's, as of the last reply.
        self._clock_offset: float | None = None

    async def create(
        self,
        info: SessionInfo,
        *,
        state: FloatArray | None = None,
        position: int = 0,
        owner_limit: int | None = None,
    ) -> Session:
        """See ``SessionStore.create``."""
        return await self._whole(self._create(info, state, position, owner_limit))

    async def load(self, key: SessionKey, *, fresh: bool = False) -> Session:
        """See ``SessionStore.load``. A copy that is the store's is not sent again."""
        cached = self._cached(key)
        if cached is not None and not fresh:
            return cached
        return await self._load(key, self._fresh_reads if fresh else self._reads)

    async def extend(self, key: SessionKey, seconds: float) -> None:
        """See ``SessionStore.extend``. Asks the server only where the session might expire before that."""
        if any(self.extend_now([self._cache.get(key)], seconds)):
            return
        keys = self._keys(key)
        names = [keys.session, self._index[0]]
        reply = await self._ask(self._writes, scripts.EXTEND, names, keys.member, millis(seconds))
        cached = self._cache.get(key)
        if reply.status != "gone" and cached is not None:
            self._cache.put(cached._replace(expires=int(reply.facts[0]) / 1000))

    async def commit(self, key: SessionKey, commit: Commit) -> Committed | Refused:
        """See ``SessionStore.commit``."""
        return await self._whole(self._commit(key, commit))

    async def _commit(self, key: SessionKey, commit: Commit) -> Committed | Refused:
        sent = self._send_commit(await self._info_of(key, commit.token), commit)
        await asyncio.wait((sent.reply,))
        return self._outcome(sent)

    def cohorts_now(self, principal: str, session_ids: Sequence[str], seconds: float) -> Sequence[tuple[int, Cohort]]:
        """See ``LocalStore.cohorts_now``: none, for each session is one value of the server's."""
        return ()

    def load_now(self, keys: Sequence[SessionKey]) -> Sequence[Session | None]:
        """See ``LocalStore.load_now``: the copies, where there are any."""
        return [self._cached(key) for key in keys]

    def extend_now(self, sessions: Sequence[Session | None], seconds: float) -> Sequence[Session | None]:
        """See ``LocalStore.extend_now``: those that live for so long anyway."""
        now = self._now()
        if now is None:
            return [None] * len(sessions)
        return [session if session is not None and session.expires - now >= seconds else None for session in sessions]

    def commit_soon(self, sessions: Sequence[Session], commits: Commits, tell: Tell) -> None:
        """See ``LocalStore.commit_soon``."""
        told: dict[int, Told] = {}

        def came(at: int, outcome: Told) -> None:
            told[at] = outcome
            if len(told) == len(commits):
                tell([told[at] for at in range(len(commits))])

        for at, session in enumerate(sessions):
            self.commit_one_soon(session, commits.of(at, session), functools.partial(came, at))

    def at_hand(self, key: SessionKey, seconds: float) -> Session | None:
        """See ``LocalStore.at_hand``."""
        return self.extend_now([self._cached(key)], seconds)[0]

    def commit_one_soon(self, session: Session, commit: Commit, tell: TellOne) -> None:
        """See ``LocalStore.commit_one_soon``."""

        def answered(reply: asyncio.Future[list[Any]]) -> None:
            self._under_way.discard(reply)
            try:
                outcome = self._outcome(sent)
            except Exception as error:  # noqa: BLE001 - the caller is told, whatever it is
                tell(error)
            else:
                tell(outcome.session if isinstance(outcome, Committed) else outcome)

        try:
            sent = self._send_commit(session.info, commit)
        except Exception as error:  # noqa: BLE001 - likewise
            tell(error)
            return
        self._under_way.add(sent.reply)
        sent.reply.add_done_callback(answered)

    async def delete(self, key: SessionKey) -> None:
        """See ``SessionStore.delete``."""
        await self._whole(self._delete(key))

    async def counts(self) -> dict[VersionKey, int]:
        """See ``SessionStore.counts``."""
        live = await self._sweep()
        return {read_version(name): int(count) for name, count in zip(live[::2], live[1::2], strict=True)}

    async def sweep(self) -> Sequence[SessionKey]:
        """See ``SessionStore.sweep``. The server expires sessions by itself; this keeps its indexes short."""
        with contextlib.suppress(StoreUnavailable):  # there is a next time
            await self._sweep()
        return ()

    async def list_sessions(self, principal: str, *, after: str = "", limit: int) -> Sequence[SessionSummary]:
        """See ``SessionStore.list_sessions``."""
        names = [f"{self._prefix}names:{principal}"]
        reply = await self._ask(self._reads, scripts.LIST, names, self._prefix, principal, after, limit)
        summaries = []
        for row in reply.facts[0]:
            try:
                summaries.append(read_summary(principal, row))
            except CorruptState as error:  # one broken session must not hide the others
                _log.error("a session is left out of a list: %s", error.message)
        return summaries

    async def close(self) -> None:
        """See ``SessionStore.close``. Waits for what is under way."""
        if self._under_way:
            await asyncio.wait(self._under_way)
        await self._reads.close()
        await self._writes.close()
        self._cache.clear()

    async def _load(self, key: SessionKey, link: Link) -> Session:
        cached = self._cached(key)
        reply = await self._ask(link, scripts.LOAD, [self._keys(key).session], cached.token if cached else b"")
        if reply.status == "gone":
            raise self._gone(key)
        if reply.status == "same" and cached is not None:
            expires, used = reply.facts
            session = cached._replace(expires=int(expires) / 1000, last_used=int(used) / 1000)
            self._cache.put(session)
            return session
        return self._read(key, reply)

    async def _create(
        self, info: SessionInfo, state: FloatArray | None, position: int, owner_limit: int | None
    ) -> Session:
        info = info._replace(ttl=millis(info.ttl) / 1000)
        keys, token = self._keys(info.key), new_token()
        reply = await self._ask(
            self._writes,
            scripts.CREATE,
            [keys.session, *self._index, keys.names],
            self._prefix,
            keys.member,
            info.key.session_id,
            info.create_digest,
            str(info.version),
            info.fingerprint,
            millis(info.ttl),
            token,
            position,
            self._encode(info, blob.Content(position, token, state, None)),
            self._max_sessions,
            "" if owner_limit is None else owner_limit,
        )
        if reply.status == "there":
            return self._read(info.key, reply)
        if reply.status == "taken":
            raise SessionExists(
                f"session id {info.key.session_id!r} is taken by a session that another request made",
                session_id=info.key.session_id,
            )
        if reply.status == "enough" and owner_limit is not None:
            raise SessionLimit(f"this caller may keep at most {owner_limit} sessions", limit=owner_limit)
        if reply.status == "full":
            raise SessionLimit(f"the store keeps at most {self._max_sessions} sessions", limit=self._max_sessions)
        info = info._replace(created=reply.now)
        session = Session(info, position, state, None, token, reply.now, reply.now + info.ttl)
        self._cache.put(session)
        return session

    def _send_commit(self, info: SessionInfo, commit: Commit) -> "_SentCommit":
        keys, token = self._keys(info.key), new_token()
        last = LastStep(commit.begin, commit.digest, commit.reply)
        reply = self._writes.call(
            scripts.COMMIT,
            (keys.session, self._index[0]),
            keys.member,
            commit.token,
            "" if commit.position is None else commit.position,
            commit.digest,
            token,
            commit.reply.position,
            commit.begin,
            self._encode(info, blob.Content(commit.reply.position, token, commit.state, last)),
        )
        return _SentCommit(info, commit, token, last, reply)

    def _outcome(self, sent: "_SentCommit") -> Committed | Refused:
        """What became of a commit, once its reply is there."""
        info, commit, token, last, answer = sent
        try:
            reply = self._take(answer.result())
        except NoAnswer as error:
            self._cache.drop(info.key)
            raise CommitUnknown(f"{error}; repeat the step to find out whether it was applied") from error
        if reply.status == "gone":
            raise self._gone(info.key)
        if reply.status != "committed":
            _log.info("a commit was refused: to the stored session the step is a %r", reply.status)
            return Refused(Verdict(reply.status), self._read(info.key, reply))
        session = Session(info, commit.reply.position, commit.state, last, token, reply.now, reply.now + info.ttl)
        self._cache.put(session)
        return Committed(session)

    async def _delete(self, key: SessionKey) -> None:
        keys = self._keys(key)
        self._cache.drop(key)
        await self._ask(
            self._writes, scripts.DELETE, [keys.session, *self._index, keys.names], keys.member, key.session_id
        )
        self._cache.drop(key)

    async def _sweep(self) -> list[bytes]:
        """Takes what has expired off the indexes, some at a time; returns versions and their counts in turn."""
        while True:
            reply = await self._ask(self._writes, scripts.SWEEP, self._index, self._prefix, _SWEEP_AT_A_TIME)
            removed, live = reply.facts
            if removed < _SWEEP_AT_A_TIME:
                return list(live)

    async def _whole(self, operation: Coroutine[Any, Any, _T]) -> _T:
        """Carries an operation through, whatever becomes of its caller."""
        task = asyncio.create_task(operation)
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)
        return await asyncio.shield(task)

    async def _ask(self, link: Link, script: Script, keys: Sequence[str], *arguments: Argument) -> "_Reply":
        """Runs a script that is safe to run again: no answer is the same as none sent.

        Again at once where the connection was dead: it may have died unnoticed while nothing was to be sent.
        """
        try:
            try:
                return await self._call(link, script, keys, *arguments)
            except ConnectionLost:
                return await self._call(link, script, keys, *arguments)
        except NoAnswer as error:
            raise StoreUnavailable(str(error)) from error

    async def _call(self, link: Link, script: Script, keys: Sequence[str], *arguments: Argument) -> "_Reply":
        return self._take(await link.call(script, keys, *arguments))

    def _take(self, answer: Sequence[Any]) -> "_Reply":
        status, now, *facts = answer
        reply = _Reply(status.decode(), now / 1000, facts)
        self._clock_offset = reply.now - asyncio.get_running_loop().time()
        return reply

    def _now(self) -> float | None:
        """The store's clock; None before it was first read."""
        return None if self._clock_offset is None else asyncio.get_running_loop().time() + self._clock_offset

    def _cached(self, key: SessionKey) -> Session | None:
        cached, now = self._cache.get(key), self._now()
        return cached if cached is not None and now is not None and cached.expires > now else None

    async def _info_of(self, key: SessionKey, token: bytes) -> SessionInfo:
        """What the session was opened with: of the copy that the step ran on, or where that has gone, the store's."""
        cached = self._cache.get(key)
        if cached is not None and cached.token == token:
            return cached.info
        return (await self._load(key, self._reads)).info

    def _read(self, key: SessionKey, reply: "_Reply") -> Session:
        try:
            session = read_record(key, reply.facts[0])
        except ServiceError:
            self._cache.drop(key)
            raise
        self._cache.put(session)
        return session

    def _encode(self, info: SessionInfo, content: blob.Content) -> bytes:
        return blob.encode(content, form=self._write_form, fingerprint=info.fingerprint, binding=binding(info))

    def _gone(self, key: SessionKey) -> SessionNotFound:
        self._cache.drop(key)
        return SessionNotFound(
            f"no session {key.session_id!r}: never opened, deleted or expired", session_id=key.session_id
        )

    def _keys(self, key: SessionKey) -> Keys:
        return keys_of(self._prefix, key)


class _SentCommit(NamedTuple):
    """A commit on its way, and the link's future of its reply."""

    info: SessionInfo
    commit: Commit
    token: bytes
    last: LastStep
    reply: "asyncio.Future[list[Any]]"


class _Reply(NamedTuple):
    """What a script returned: a word, the store's clock in seconds, and what belongs to the word."""

    status: str
    now: float
    facts: Sequence[Any]
