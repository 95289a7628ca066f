"""A session as the store's server holds it: a hash whose plain fields the scripts compare, and a blob for the rest.

The names of the fields, what they mean and the keys are shared with the gateways of the release before and after.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

from service.errors import CorruptState
from service.sessions import Session, SessionInfo, SessionSummary, blob
from service.types import SessionKey, VersionKey

# Fields of scripts/lib.lua `record`, and of scripts/list.lua.
_RECORD_FIELDS = 12
_SUMMARY_FIELDS = 8


class Keys(NamedTuple):
    """The store's keys of one session. An id never holds a slash, a principal may.

    Attributes:
        session: The hash.
        names: The principal's ids.
        member: What names the session within the indexes, ``principal/id``.
    """

    session: str
    names: str
    member: str


def keys_of(prefix: str, key: SessionKey) -> Keys:
    """The keys of one session."""
    member = f"{key.principal}/{key.session_id}"
    return Keys(f"{prefix}session:{member}", f"{prefix}names:{key.principal}", member)


@functools.lru_cache(maxsize=8192)
def binding(info: SessionInfo) -> bytes:
    """What a session's blob belongs to. A blob under another key, or beside other facts, is corrupt."""
    # Not repr: what it escapes of an owner's name differs between releases of Python.
    return ascii((*info.key, *info.version, info.fingerprint, millis(info.ttl), info.create_digest)).encode()


def millis(seconds: float) -> int:
    """Seconds as the store counts them; at least one."""
    return max(1, round(1000 * seconds))


def read_record(key: SessionKey, record: Sequence[bytes | None]) -> Session:
    """Rebuilds a session from its record.

    Raises:
        CorruptState: it is broken, or its parts do not belong together.
        StoreUnavailable: a newer release wrote it.
    """
    if len(record) != _RECORD_FIELDS or None in record:
        raise CorruptState(f"the stored session has {sum(f is not None for f in record)} of {_RECORD_FIELDS} fields")
    version, fingerprint, ttl, digest, created, used, expires, token, position, begin, step_digest, body = (
        field or b"" for field in record
    )
    info = _info(key, version, fingerprint, ttl, digest, created)
    content = blob.decode(body, fingerprint=info.fingerprint, binding=binding(info))
    last = content.last
    of_blob = (
        content.token,
        b"%d" % content.position,
        b"%d" % last.begin if last else b"",
        last.digest if last else b"",
    )
    if of_blob != (token, position, begin, step_digest):
        raise CorruptState("the stored session's fields and its state are not of the same commit")
    return Session(
        info=info,
        position=content.position,
        state=content.state,
        last=last,
        token=token,
        last_used=_seconds(used),
        expires=_seconds(expires),
    )


def read_summary(principal: str, row: Sequence[object]) -> SessionSummary:
    """Rebuilds one row of a list.

    Raises:
        CorruptState: a field is missing or broken.
    """
    session_id, fields = row
    if not isinstance(session_id, bytes) or not isinstance(fields, list) or len(fields) != _SUMMARY_FIELDS:
        raise CorruptState(f"the store's list has a row that is none: {row!r}")
    version, fingerprint, ttl, digest, created, used, expires, position = (field or b"" for field in fields)
    info = _info(SessionKey(principal, session_id.decode()), version, fingerprint, ttl, digest, created)
    return SessionSummary(info, int(position), _seconds(used), _seconds(expires))


def read_version(text: bytes) -> VersionKey:
    """``model/version`` as a ``VersionKey``."""
    model, _, version = text.decode().rpartition("/")
    return VersionKey(model, int(version))


def _info(
    key: SessionKey, version: bytes, fingerprint: bytes, ttl: bytes, digest: bytes, created: bytes
) -> SessionInfo:
    try:
        return SessionInfo(
            key=key,
            version=read_version(version),
            fingerprint=fingerprint.decode(),
            ttl=_seconds(ttl),
            create_digest=digest,
            created=_seconds(created),
        )
    except ValueError as error:
        raise CorruptState(f"the stored session's facts cannot be read: {error}") from None


def _seconds(text: bytes) -> float:
    try:
        return int(text) / 1000
    except ValueError:
        raise CorruptState(f"the stored session has {text!r} where a time stands") from None
