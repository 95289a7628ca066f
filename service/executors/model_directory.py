"""The directory of models: ``MODEL/VERSION/saved_model.pb``, versions being numbers."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

from service.types import VersionKey

_log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")
_VERSION = re.compile(r"[1-9][0-9]{0,17}\Z")


class Found(NamedTuple):
    """A version on disk: its directory, and what changes when somebody writes into it."""

    path: Path
    stamp: tuple[tuple[str, int, int], ...]


def find_versions(directory: Path) -> dict[VersionKey, Found]:
    """Every version that is there, oldest first.

    Directories by other names than numbers are none: that is how a version is written before its rename. What was
    deleted while it was looked at counts as not there.
    """
    found: dict[VersionKey, Found] = {}
    for model in _directories(directory):
        if not _NAME.match(model.name):
            continue
        for version in _directories(model):
            if _VERSION.match(version.name) and (version / "saved_model.pb").is_file():
                found[VersionKey(model.name, int(version.name))] = Found(version, _stamp(version))
    return dict(sorted(found.items()))


def _directories(directory: Path) -> list[Path]:
    try:
        return [child for child in directory.iterdir() if child.is_dir()]
    except OSError as error:
        _log.warning("cannot read %s: %s", directory, error)
        return []


def _stamp(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of every file."""
    entries = []
    for path in sorted(directory.rglob("*")):
        try:
            status = path.stat()
        except OSError:
            continue
        if path.is_file():
            entries.append((str(path.relative_to(directory)), status.st_size, status.st_mtime_ns))
    return tuple(entries)
