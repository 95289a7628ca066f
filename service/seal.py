"""What the gateway hands out and takes back: page tokens and snapshots, authenticated with its own key.

A sealed blob is ``version (1 byte) | HMAC-SHA-256 (32 bytes) | payload``; the MAC covers its purpose, its version and
the payload, so that a page token is never taken for a snapshot.
"""

import base64
import binascii
import hashlib
import hmac
import json
import struct
from typing import NamedTuple

import numpy as np

from service.errors import InvalidArgument
from service.types import FloatArray, VersionKey

_VERSION = 1
_MAC_BYTES = 32
_LITTLE_FLOAT32 = np.dtype("<f4")


class Snapshot(NamedTuple):
    """A session without its identity: what a new session can be made of.

    Attributes:
        version: The model version that it ran on.
        fingerprint: The fingerprint of that version.
        position: Time steps consumed.
        state: ``[state_size]``; None for the initial state.
    """

    version: VersionKey
    fingerprint: str
    position: int
    state: FloatArray | None


class Sealer:
    """Seals and unseals with one secret.

    Args:
        secret: At least 32 bytes; gateways that share it take each other's blobs.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def seal_snapshot(self, snapshot: Snapshot) -> bytes:
        """A snapshot as an opaque blob."""
        header = json.dumps(
            {
                "model": snapshot.version.model,
                "version": snapshot.version.version,
                "fingerprint": snapshot.fingerprint,
                "position": snapshot.position,
                "state_size": None if snapshot.state is None else snapshot.state.size,
            }
        ).encode()
        state = b"" if snapshot.state is None else snapshot.state.astype(_LITTLE_FLOAT32, copy=False).tobytes()
        return self._seal(b"snapshot", struct.pack("<I", len(header)) + header + state)

    def unseal_snapshot(self, blob: bytes) -> Snapshot:
        """The snapshot in a blob.

        Raises:
            InvalidArgument: the blob was not made with this key, or its state is not finite or not of its size.
        """
        payload = self._unseal(b"snapshot", blob, "snapshot")
        (length,) = struct.unpack_from("<I", payload)
        header = json.loads(payload[4 : 4 + length])
        state = None
        if header["state_size"] is not None:
            state = np.frombuffer(payload, _LITTLE_FLOAT32, offset=4 + length)
            if state.size != header["state_size"] or not np.isfinite(state).all():
                raise InvalidArgument(
                    f"the snapshot's state has {state.size} values; expected {header['state_size']} that are finite",
                    field="snapshot",
                )
        version = VersionKey(header["model"], header["version"])
        return Snapshot(version, header["fingerprint"], header["position"], state)

    def seal_page(self, principal: str, after: str) -> str:
        """A page token: good for this principal alone."""
        return base64.urlsafe_b64encode(self._seal(b"page:" + principal.encode(), after.encode())).decode()

    def unseal_page(self, principal: str, token: str) -> str:
        """Where the page begins; "" for the first.

        Raises:
            InvalidArgument: the token is not one that this caller was given.
        """
        if not token:
            return ""
        try:
            blob = base64.b64decode(token, altchars=b"-_", validate=True)
        except (binascii.Error, ValueError):
            blob = b""
        return self._unseal(b"page:" + principal.encode(), blob, "page_token").decode()

    def _seal(self, purpose: bytes, payload: bytes) -> bytes:
        version = bytes([_VERSION])
        return version + self._mac(purpose, version + payload) + payload

    def _unseal(self, purpose: bytes, blob: bytes, field: str) -> bytes:
        version, mac, payload = blob[:1], blob[1 : 1 + _MAC_BYTES], blob[1 + _MAC_BYTES :]
        if version and version[0] > _VERSION:
            raise InvalidArgument(f"{field} has version {version[0]}; this gateway reads up to {_VERSION}", field=field)
        if not hmac.compare_digest(mac, self._mac(purpose, version + payload)):
            raise InvalidArgument(f"{field} was not made by this gateway, or has been changed", field=field)
        return payload

    def _mac(self, purpose: bytes, message: bytes) -> bytes:
        purposed = hmac.digest(self._secret, purpose, hashlib.sha256)
        return hmac.digest(purposed, message, hashlib.sha256)
