"""Bearer tokens: a file that names principals by the hashes of their tokens, read anew when it changes."""

import hashlib
import logging
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from service.config import SettingsError
from service.errors import Unauthenticated
from service.identity import ANONYMOUS, Principal

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_.@-]{1,64}\Z")
_HASH = re.compile(r"[0-9a-f]{64}\Z")
_KEYS = {"tokens_sha256", "models", "max_sessions", "max_queued_steps"}


class Anyone:
    """No tokens: every caller is one and the same principal, or the one that its certificate names."""

    def caller(self, authorization: str | None, certificate: str | None) -> Callable[[], Principal]:
        """See ``TokenFile.caller``."""
        principal = ANONYMOUS if certificate is None else Principal(name=f"certificate:{certificate}")
        return lambda: principal

    def reload(self) -> None:
        """There is nothing to read."""


class TokenFile:
    """Principals by their tokens.

    The file is TOML, a table for each principal::

        [alice]
        tokens_sha256 = ["5e88..."]   # printf %s "$TOKEN" | sha256sum
        models = ["copy"]             # optional: the only ones that it may use and see
        max_sessions = 100            # optional
        max_queued_steps = 256        # optional

    Args:
        path: The file.

    Raises:
        SettingsError: it cannot be read, or says something that is not understood.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stamp = self._changed()
        self._principals = _read(path)

    def caller(self, authorization: str | None, certificate: str | None) -> Callable[[], Principal]:
        """Who a call's credentials stand for, to be asked each time that it matters.

        Args:
            authorization: The call's ``authorization`` metadata.
            certificate: The common name of its TLS certificate; a token is asked for all the same.
        """
        scheme, _, token = (authorization or "").partition(" ")
        # A hash is looked up, never compared piece by piece: timing tells nothing of a token that is not known.
        digest = hashlib.sha256(token.encode()).hexdigest() if scheme.lower() == "bearer" else ""

        def principal() -> Principal:
            found = self._principals.get(digest)
            if found is None:
                raise Unauthenticated("expected a valid token in the metadata: authorization: Bearer TOKEN")
            return found

        return principal

    def reload(self) -> None:
        """Reads the file if it changed. One that cannot be read leaves what was there, and says so in the log."""
        try:
            stamp = self._changed()
            if stamp == self._stamp:
                return
            self._principals = _read(self._path)
            self._stamp = stamp
        except SettingsError as error:
            _log.error("the token file was not reloaded: %s", error)
            return
        _log.info("token file reloaded", extra={"tokens": len(self._principals)})

    def _changed(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError as error:
            raise SettingsError(f"--token-file: {error.strerror}: {str(self._path)!r}") from None
        return status.st_mtime_ns, status.st_size, status.st_ino


def _read(path: Path) -> dict[str, Principal]:
    """Principals by the SHA-256 of their tokens."""
    try:
        tables = tomllib.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise SettingsError(f"--token-file: {str(path)!r} cannot be read: {error}") from None
    principals: dict[str, Principal] = {}
    for name, table in tables.items():
        principal, hashes = _parse(name, table)
        for digest in hashes:
            if digest in principals:
                raise SettingsError(f"--token-file: {name} and {principals[digest].name} share a token")
            principals[digest] = principal
    return principals


def _parse(name: str, table: Any) -> tuple[Principal, list[str]]:
    if not _NAME.match(name) or not isinstance(table, dict):
        raise SettingsError(f"--token-file: expected a table [NAME] of {sorted(_KEYS)}; got {name!r}")
    if unknown := set(table) - _KEYS:
        raise SettingsError(f"--token-file: [{name}] has {sorted(unknown)}; expected {sorted(_KEYS)}")
    hashes = table.get("tokens_sha256")
    if not isinstance(hashes, list) or not all(isinstance(h, str) and _HASH.match(h) for h in hashes):
        raise SettingsError(
            f"--token-file: [{name}] tokens_sha256: expected a list of SHA-256 in 64 hexadecimal digits"
        )
    models = table.get("models")
    if models is not None and not (isinstance(models, list) and all(isinstance(m, str) for m in models)):
        raise SettingsError(f"--token-file: [{name}] models: expected a list of names; got {models!r}")
    limits = {key: table.get(key) for key in ("max_sessions", "max_queued_steps")}
    for key, limit in limits.items():
        if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 0):
            raise SettingsError(f"--token-file: [{name}] {key}: expected 0 or more; got {limit!r}")
    return Principal(name=name, models=None if models is None else frozenset(models), **limits), hashes
