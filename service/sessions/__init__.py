"""Sessions, and the protocol that applies each step exactly once.

A session is its state, the ``position`` it has reached, what its last step was (where it began, the digest of its
inputs, its reply) and a random token that every create and commit writes anew. A commit is one compare-and-set on that
token; ``judge`` is the whole decision, and every store makes the same one.
"""

import enum
import os
import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from service.types import FloatArray, SessionKey, StepReply, VersionKey

if TYPE_CHECKING:
    from service.sessions.cohort import Cohort, Commits

TOKEN_BYTES = 16
_TOKENS_AT_ONCE = 256
_drawn: list[bytes] = []  # at most one block, which small objects that live long would leave full of holes
os.register_at_fork(after_in_child=_drawn.clear)  # what was drawn before is the parent's


class SessionInfo(NamedTuple):
    """What a session is opened with and keeps.

    Attributes:
        key: Its owner and id.
        version: The model version that it is pinned to.
        fingerprint: The fingerprint that this version had.
        ttl: Seconds that it lives past its last commit.
        create_digest: Digest of the request that made it, so that a repeated create is told from another one.
        created: Seconds since the epoch, on the store's clock.
    """

    key: SessionKey
    version: VersionKey
    fingerprint: str
    ttl: float
    create_digest: bytes
    created: float


class LastStep(NamedTuple):
    """The last step that was applied: all that it takes to answer it again."""

    begin: int
    digest: bytes
    reply: StepReply


class Session(NamedTuple):
    """A session as of one commit. Immutable: the next commit makes another.

    Attributes:
        info: What it was opened with.
        position: Time steps consumed.
        state: ``[state_size]``, or None for the model's initial state.
        last: The last applied step; None where there is nothing to replay.
        token: Names this commit among all commits of all histories.
        last_used: Seconds since the epoch, on the store's clock.
        expires: Likewise.
    """

    info: SessionInfo
    position: int
    state: FloatArray | None
    last: LastStep | None
    token: bytes
    last_used: float
    expires: float


class SessionSummary(NamedTuple):
    """What a list of sessions says of each: a session without its state and its last step.

    Attributes:
        info: What it was opened with.
        position: Time steps consumed.
        last_used: Seconds since the epoch, on the store's clock.
        expires: Likewise.
    """

    info: SessionInfo
    position: int
    last_used: float
    expires: float


class Commit(NamedTuple):
    """One applied step, to be written if the session still is what the step ran on.

    Attributes:
        token: The token of the session that the step ran on.
        position: Where the caller said that the step begins; None where it did not say.
        begin: Where it did begin: the position of the session that it ran on.
        digest: Digest of its inputs.
        state: ``[state_size]``, after the step.
        reply: What its caller gets.
    """

    token: bytes
    position: int | None
    begin: int
    digest: bytes
    state: FloatArray
    reply: StepReply


class Verdict(enum.Enum):
    """What a step is to a session."""

    RUN = "run"
    """It begins where the session stands."""
    REPLAY = "replay"
    """It is the session's last step, sent again."""
    CONFLICT = "conflict"
    """It begins where the last step began, with other inputs."""
    MISMATCH = "mismatch"
    """It begins anywhere else."""


def judge(session: Session, position: int | None, digest: bytes) -> Verdict:
    """Decides what a step that begins at ``position`` with inputs of ``digest`` is to ``session``."""
    if position is None or position == session.position:
        return Verdict.RUN
    last = session.last
    if last is None or position != last.begin:
        return Verdict.MISMATCH
    return Verdict.REPLAY if digest == last.digest else Verdict.CONFLICT


class Committed(NamedTuple):
    """The commit was written; the session as it is now."""

    session: Session


class Refused(NamedTuple):
    """The commit was not written: the session is no longer what the step ran on.

    Attributes:
        verdict: What the step is to the stored session. RUN: its position fits, the history does not, so it has to be
            run again on the stored state.
        session: The stored session.
    """

    verdict: Verdict
    session: Session


class SessionStore(Protocol):
    """Keeps sessions. ``memory.py`` in this process, ``redis.py`` in a server that several gateways share.

    Cancelling a caller never tears a command: it is applied whole, or not at all.
    """

    async def create(
        self,
        info: SessionInfo,
        *,
        state: FloatArray | None = None,
        position: int = 0,
        owner_limit: int | None = None,
    ) -> Session:
        """Makes a session; returns the one that is there if the same request made it (``info.create_digest``).

        ``info.created`` is ignored: the store's clock sets it. ``owner_limit`` is the most sessions that its owner may
        have, this one included; None for no limit but the store's.

        Raises:
            SessionExists: the id is taken by another create.
            SessionLimit: there are as many sessions as the store keeps, or as its owner may have.
            StoreUnavailable: nothing was made, or a repeated create will find it.
        """
        ...

    async def load(self, key: SessionKey, *, fresh: bool = False) -> Session:
        """The session; a copy that this gateway caches unless ``fresh``, and then the store's own.

        Raises:
            SessionNotFound: it is not there (never told from a cache).
            CorruptState: what is stored fails its checks.
            StoreUnavailable: the store could not be asked.
        """
        ...

    async def extend(self, key: SessionKey, seconds: float) -> None:
        """Lets a session live for at least ``seconds`` from now: the step that is being run will need it."""
        ...

    async def commit(self, key: SessionKey, commit: Commit) -> Committed | Refused:
        """Writes one step by compare-and-set on the token. Never makes a session.

        Raises:
            SessionNotFound: it was deleted or has expired.
            StoreUnavailable: nothing was written.
            CommitUnknown: the store did not answer.
        """
        ...

    async def delete(self, key: SessionKey) -> None:
        """Ends a session; does nothing where there is none."""
        ...

    async def list_sessions(self, principal: str, *, after: str = "", limit: int) -> Sequence[SessionSummary]:
        """One owner's live sessions by id, those after ``after``, at most ``limit``; the last id is the next ``after``.

        Raises:
            StoreUnavailable: the store could not be asked.
        """
        ...

    async def counts(self) -> dict[VersionKey, int]:
        """Live sessions by version."""
        ...

    async def sweep(self) -> Sequence[SessionKey]:
        """Removes what has expired; returns what was removed here (a server that expires by itself: nothing)."""
        ...

    async def close(self) -> None:
        """Lets go of connections. Safe to call twice."""
        ...


# What became of commits: the session as it is now, or why nothing was written.
Told = Session | Refused | Exception
Tell = Callable[[Sequence[Told]], None]
TellOne = Callable[[Told], None]


@runtime_checkable
class LocalStore(Protocol):
    """What a store can do besides for sessions that it has in this process, if only as copies: nothing suspends."""

    def cohorts_now(
        self, principal: str, session_ids: Sequence[str], seconds: float, /
    ) -> Sequence[tuple[int, "Cohort"]]:
        """The cohorts whose sessions are named one after the other, each with the place of its first.

        Only of sessions that live for at least ``seconds`` from now.
        """
        ...

    def load_now(self, keys: Sequence[SessionKey], /) -> Sequence[Session | None]:
        """``SessionStore.load`` of each; None where the session is not at hand, or not there at all."""
        ...

    def extend_now(self, sessions: Sequence[Session | None], seconds: float, /) -> Sequence[Session | None]:
        """``SessionStore.extend`` of what was just loaded; None, and nothing is done, where that takes more."""
        ...

    def commit_soon(self, sessions: Sequence[Session], commits: "Commits", tell: Tell) -> None:
        """``SessionStore.commit`` of steps that ran on ``sessions``; ``tell`` is called with what each comes to.

        Called before this returns or later, once, with the outcomes or with what ``commit`` would raise; with a cohort
        where all were written and are kept as one. The commits are carried through whatever becomes of the caller.
        """
        ...

    def at_hand(self, key: SessionKey, seconds: float, /) -> Session | None:
        """``load_now`` and ``extend_now`` of one."""
        ...

    def commit_one_soon(self, session: Session, commit: Commit, tell: TellOne) -> None:
        """``commit_soon`` of one; its arrays are the store's from now on."""
        ...


def new_token() -> bytes:
    """128 random bits: no two commits of any history share one."""
    return new_tokens(1)[0]


def new_tokens(count: int) -> list[bytes]:
    """So many of them."""
    block = draw_tokens(count)
    return [block[at : at + TOKEN_BYTES] for at in range(0, len(block), TOKEN_BYTES)]


def draw_tokens(count: int) -> bytes:
    """So many of them, one after the other. One call of the operating system's makes many."""
    size = count * TOKEN_BYTES
    block = _drawn.pop() if _drawn else b""
    if len(block) < size:
        block = secrets.token_bytes(max(_TOKENS_AT_ONCE * TOKEN_BYTES, size))
    if len(block) > size:
        _drawn.append(block[size:])
    return block[:size]
