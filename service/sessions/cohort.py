"""Sessions that are stepped together, and kept together: columns of a batch instead of a row for each.

Callers who step many sessions at once mostly step the same ones again. What the batch made of them then stays as it is:
its states are one array, which is what the next batch starts from. Nothing is copied, and nothing is done for each
session. Whatever else is done to one of them makes ``Session``s of all of them: the rules are theirs.
"""

from collections.abc import Sequence
from typing import Any, overload

import numpy as np

from service.digests import Digests
from service.sessions import TOKEN_BYTES, Commit, LastStep, Session, SessionInfo, SessionSummary, draw_tokens
from service.types import FloatArray, SessionKey, StepReply, VersionKey, tuple_of

# The digests of a cohort's last steps are found when they are asked for where their inputs take little room beside the
# states: a share of it.
_INPUTS_SHARE = 0.25
_LITTLE_FLOAT32 = np.dtype("<f4")
# States of fewer bytes are copied all the same: among many small blocks the executor's leave holes that fit nothing
# else, up to as much memory again. Large blocks do not.
LEAST_KEPT_BYTES = 128 * 1024


class Replies(Sequence[StepReply]):
    """What steps with outputs of one shape return.

    Attributes:
        positions: Time steps consumed, of each.
        outputs: ``[steps, time, output_dim]``.
        content: The bytes of ``outputs``, little-endian, where they are there anyway; else None.
    """

    __slots__ = ("content", "outputs", "positions")

    def __init__(self, positions: Sequence[int], outputs: FloatArray, content: bytes | None = None) -> None:
        self.positions = positions
        self.outputs = outputs
        self.content = content

    @classmethod
    def kept(cls, positions: Sequence[int], outputs: FloatArray) -> "Replies":
        """With a copy of the outputs: the bytes that are sent, so that one copy is all that is made."""
        content = outputs.astype(_LITTLE_FLOAT32, copy=False).tobytes()
        return cls(positions, np.frombuffer(content, _LITTLE_FLOAT32).reshape(outputs.shape), content)

    @classmethod
    def of(cls, replies: Sequence[StepReply]) -> "Replies":
        """Of replies of one shape; at least one."""
        outputs = np.concatenate([reply.outputs for reply in replies])
        return cls([reply.position for reply in replies], outputs.reshape(len(replies), *replies[0].outputs.shape))

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, at: int) -> StepReply: ...
    @overload
    def __getitem__(self, at: slice) -> "Replies": ...
    def __getitem__(self, at: int | slice) -> "StepReply | Replies":
        """One by itself: its outputs are a copy, which does not hold on to those of the others."""
        if isinstance(at, slice):
            return Replies(self.positions[at], self.outputs[at])
        return tuple_of(StepReply, (self.positions[at], self.outputs[at].copy()))


class Commits:
    """Steps that ran side by side, to be written: columns of what a ``Commit`` holds of one.

    The arrays are the batch's: what is kept of them has to be copied.

    Attributes:
        positions: Where each caller said that its step begins; None where it did not say.
        digests: Of their inputs.
        outputs: ``[steps, time, output_dim]``.
        states: ``[steps, state_size]``, after the steps.
        native: The states as the executor has them, where ``states`` is all of what it answered; else None.
    """

    __slots__ = ("digests", "native", "outputs", "positions", "states")

    def __init__(
        self,
        positions: Sequence[int | None],
        digests: Digests,
        outputs: FloatArray,
        states: FloatArray,
        native: object = None,
    ) -> None:
        self.positions = positions
        self.digests = digests
        self.outputs = outputs
        self.states = states
        self.native = native

    def __len__(self) -> int:
        return len(self.positions)

    def of(self, at: int, session: Session) -> Commit:
        """One of them, which ran on ``session``."""
        begin, output = session.position, self.outputs[at]
        reply = tuple_of(StepReply, (begin + len(output), output.copy()))
        state, digest = self.states[at].copy(), self.digests[at]
        return tuple_of(Commit, (session.token, self.positions[at], begin, digest, state, reply))


class _Members:
    """What does not change of a cohort's sessions."""

    __slots__ = ("infos", "keys", "session_ids", "ttl")

    def __init__(self, infos: Sequence[SessionInfo]) -> None:
        self.infos = infos
        self.keys = [info.key for info in infos]
        self.session_ids = [key.session_id for key in self.keys]
        self.ttl = min([info.ttl for info in infos])


class Cohort(Sequence[Session]):
    """The sessions that one batch has stepped, as of their commit. Immutable: their next commit makes another.

    All are pinned to one model version. As a sequence it is the sessions, each made when it is asked for.

    Attributes:
        positions: Time steps consumed, of each.
        states: ``[sessions, state_size]``.
        native: The states as the executor has them; None where they are copies.
        replies: What their last steps returned.
        last_used: Seconds since the epoch, on the store's clock, of all.
        expires: When the first of them does, likewise.
    """

    __slots__ = ("_digests", "_members", "_tokens", "expires", "last_used", "native", "positions", "replies", "states")

    def __init__(self, members: _Members, positions: Sequence[int], commits: Commits, now: float) -> None:
        time = commits.outputs.shape[1]
        self._members = members
        self.positions = [begin + time for begin in positions]
        self.states, self.native = _own(commits.states, commits.native)
        self.replies = Replies.kept(self.positions, commits.outputs)
        self._digests = commits.digests.kept(int(_INPUTS_SHARE * self.states.nbytes))
        self._tokens = draw_tokens(len(positions))
        self.last_used = now
        self.expires = now + members.ttl

    @classmethod
    def of(cls, sessions: Sequence[Session], commits: Commits, now: float) -> "Cohort":
        """Sessions that one batch has stepped, after their commits."""
        members = _Members([session.info for session in sessions])
        return cls(members, [session.position for session in sessions], commits, now)

    def after(self, commits: Commits, now: float) -> "Cohort":
        """The same sessions after one more step of each."""
        return Cohort(self._members, self.positions, commits, now)

    def __len__(self) -> int:
        return len(self.positions)

    @overload
    def __getitem__(self, at: int) -> Session: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Session]: ...
    def __getitem__(self, at: int | slice) -> Session | Sequence[Session]:
        """One by itself: its arrays do not hold on to those of the others."""
        if isinstance(at, slice):
            return [self[row] for row in range(*at.indices(len(self)))]
        state = self.states[at] if len(self.positions) == 1 else self.states[at].copy()
        info, reply = self._members.infos[at], self.replies[at]
        last = tuple_of(LastStep, (reply.position - len(reply.outputs), self._digests[at], reply))
        token = self._tokens[at * TOKEN_BYTES : (at + 1) * TOKEN_BYTES]
        times = (self.last_used, self.last_used + info.ttl)
        return tuple_of(Session, (info, reply.position, state, last, token, *times))

    @property
    def version(self) -> VersionKey:
        """What all are pinned to."""
        return self.info.version

    @property
    def info(self) -> SessionInfo:
        """What the first of them was opened with; all have its version and its fingerprint."""
        return self._members.infos[0]

    @property
    def keys(self) -> Sequence[SessionKey]:
        """Of each."""
        return self._members.keys

    @property
    def session_ids(self) -> list[str]:
        """Of each."""
        return self._members.session_ids

    def session(self, key: SessionKey) -> Session:
        """The one of this key."""
        return self[self.keys.index(key)]

    def summary(self, key: SessionKey) -> SessionSummary:
        """What a list says of the one of this key."""
        row = self.keys.index(key)
        info = self._members.infos[row]
        return SessionSummary(info, self.positions[row], self.last_used, self.last_used + info.ttl)


def _own(states: FloatArray, native: object) -> tuple[FloatArray, object]:
    """States to keep: as they are where they are all that their memory holds, and much, else a copy."""
    base: Any = states.base
    whole = base is None or getattr(base, "nbytes", 0) == states.nbytes
    if whole and states.nbytes >= LEAST_KEPT_BYTES:
        return states, native
    return np.array(states), None
