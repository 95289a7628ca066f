"""The Lua scripts: one atomic step of the store each, in the files of ``scripts/``."""

import hashlib
from importlib import resources
from typing import NamedTuple

_FOLDER = resources.files(__package__).joinpath("scripts")


class Script(NamedTuple):
    """A script's source, and its SHA-1 by which the server knows it."""

    source: bytes
    sha: str


def _read(name: str) -> Script:
    """A script with ``lib.lua`` put in after its first line, which tells the server what it may do."""
    first, _, rest = _FOLDER.joinpath(f"{name}.lua").read_text().partition("\n")
    library = _FOLDER.joinpath("lib.lua").read_text()
    source = f"{first}\n{library}\n{rest}".encode()
    return Script(source, hashlib.sha1(source, usedforsecurity=False).hexdigest())


CREATE = _read("create")
COMMIT = _read("commit")
LOAD = _read("load")
EXTEND = _read("extend")
DELETE = _read("delete")
SWEEP = _read("sweep")
LIST = _read("list")
