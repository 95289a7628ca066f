"""A session's state and last step as bytes that show when they are broken.

A blob is a header, the float32 payload and a checksum. The checksum also covers what the blob belongs to (the
session's key, model version, fingerprint): a blob that was cut, flipped, or copied from another session fails it.

Two forms exist, told apart by one byte. Form 1 ends in CRC-32. Form 2 ends in 128 bits of BLAKE2b, which no accident
passes. Every release reads both, so gateways of two releases can share a store while a fleet is upgraded.
"""

import functools
import hashlib
import struct
import zlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from service.errors import CorruptState, StoreUnavailable
from service.sessions import TOKEN_BYTES, LastStep
from service.types import FloatArray, StepReply

FORMS = (1, 2)
DIGEST_BYTES = 32

_MAGIC = b"NS"
# magic, form, flags, fingerprint, position, begin, digest, token, state size, reply rows, reply columns
_HEADER = struct.Struct(f"<2sBB16sqq{DIGEST_BYTES}s{TOKEN_BYTES}sIII")
_HAS_STATE = 1
_HAS_LAST = 2
_FLOAT32 = np.dtype("<f4")
_NOTHING: FloatArray = np.zeros((0, 0), np.float32)


class Content(NamedTuple):
    """What a blob holds: see ``service.sessions.Session``."""

    position: int
    token: bytes
    state: FloatArray | None
    last: LastStep | None


def encode(content: Content, *, form: int, fingerprint: str, binding: bytes) -> bytes:
    """Packs ``content``.

    Args:
        content: ``state`` ``[state_size]``; ``last.reply.outputs`` ``[time, output_dim]``, ``last.digest`` 32 bytes.
        form: One of ``FORMS``.
        fingerprint: The model's, that the state belongs to.
        binding: What the blob belongs to; the same bytes are needed to decode it.
    """
    state, last = content.state, content.last
    outputs = last.reply.outputs if last else _NOTHING
    header = _HEADER.pack(
        _MAGIC,
        form,
        (_HAS_STATE if state is not None else 0) | (_HAS_LAST if last else 0),
        _short(fingerprint),
        content.position,
        last.begin if last else 0,
        last.digest if last else bytes(DIGEST_BYTES),
        content.token,
        state.size if state is not None else 0,
        *outputs.shape,
    )
    payload = [header, _bytes(state if state is not None else _NOTHING), _bytes(outputs)]
    return b"".join([*payload, _CHECKSUMS[form].of(binding, *payload)])


def decode(blob: bytes, *, fingerprint: str, binding: bytes) -> Content:
    """Unpacks a blob; its arrays are read-only views of it.

    Raises:
        CorruptState: it is not what was written, or was written for something else.
        StoreUnavailable: a newer release wrote it in a form that this one cannot read.
    """
    if len(blob) < _HEADER.size or blob[:2] != _MAGIC:
        raise CorruptState(f"the stored session is not one: {len(blob)} bytes without its mark")
    fields = _HEADER.unpack_from(blob)
    _, form, flags, short, position, begin, digest, token, size, rows, columns = fields
    if form not in _CHECKSUMS:
        raise StoreUnavailable(f"the stored session has form {form}; this gateway reads forms {FORMS}", form=form)
    checksum = _CHECKSUMS[form]
    end = _HEADER.size + _FLOAT32.itemsize * (size + rows * columns)
    if len(blob) != end + checksum.size:
        raise CorruptState(f"the stored session has {len(blob)} bytes; its header says {end + checksum.size}")
    if checksum.of(binding, memoryview(blob)[:end]) != blob[end:]:
        raise CorruptState("the stored session fails its checksum")
    if short != _short(fingerprint):
        raise CorruptState("the stored state belongs to a model of another fingerprint")
    state = np.frombuffer(blob, _FLOAT32, size, _HEADER.size)
    outputs = np.frombuffer(blob, _FLOAT32, rows * columns, _HEADER.size + state.nbytes).reshape(rows, columns)
    return Content(
        position=position,
        token=token,
        state=state if flags & _HAS_STATE else None,
        last=LastStep(begin, digest, StepReply(position, outputs)) if flags & _HAS_LAST else None,
    )


class _Checksum(NamedTuple):
    of: Callable[..., bytes]
    size: int


def _crc32(*parts: bytes | memoryview) -> bytes:
    value = 0
    for part in parts:
        value = zlib.crc32(part, value)
    return value.to_bytes(4, "little")


def _blake2b(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest.digest()


_CHECKSUMS = {1: _Checksum(_crc32, 4), 2: _Checksum(_blake2b, 16)}


@functools.lru_cache(maxsize=1024)
def _short(fingerprint: str) -> bytes:
    return hashlib.sha256(fingerprint.encode()).digest()[:16]


def _bytes(array: FloatArray) -> bytes:
    return np.ascontiguousarray(array, _FLOAT32).tobytes()
