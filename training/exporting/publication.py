"""Version directories: ``directory/name/version``, which appear whole or not at all."""

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}\Z")


class Target(NamedTuple):
    """Where an export is to go.

    Attributes:
        directory: holds the models, each in a directory of its name.
        name: of the model.
        version: at least 1; None for one above the highest that is there.
    """

    directory: Path
    name: str
    version: int | None = None

    def check(self) -> None:
        """Refuses what could not be written, before anything is made.

        Raises:
            ValueError: the name or the version is out of range.
            FileExistsError: the version is there.
        """
        check_name(self.name)
        choose_version(self.directory / self.name, self.version)


def check_name(name: str) -> None:
    """Refuses a name that the gateway would not serve.

    Raises:
        ValueError: it has other characters, or too many.
    """
    if not _NAME.match(name):
        raise ValueError(f"expected a model name of 1 to 64 letters, digits, '_' and '-'; got {name!r}")


def choose_version(model_dir: Path, version: int | None) -> int:
    """The version to write: the one asked for, or one above the highest that is there.

    Raises:
        ValueError: it is not positive.
        FileExistsError: it is there.
    """
    if version is None:
        children = model_dir.iterdir() if model_dir.is_dir() else ()
        return max((int(child.name) for child in children if child.name.isdecimal()), default=0) + 1
    if version < 1:
        raise ValueError(f"expected a version of at least 1; got {version}")
    _refuse_existing(model_dir / str(version))
    return version


@contextmanager
def publication(target: Path) -> Iterator[Path]:
    """A directory to write into, which becomes ``target`` when the block ends well and vanishes when it does not.

    It stands beside ``target``, under a name that no server takes for a version, so that the move is one rename.

    Raises:
        FileExistsError: ``target`` has come into being meanwhile.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
    partial.mkdir()
    try:
        yield partial
        _sync(partial)
        _refuse_existing(target)
        partial.rename(target)
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refuse_existing(target: Path) -> None:
    if target.exists():
        raise FileExistsError(f"{target} exists; an exported version is never overwritten")


def _sync(directory: Path) -> None:
    """Brings the files to the disk before the rename that makes them visible."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
