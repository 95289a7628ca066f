"""Gives back to the system what was freed: a C library keeps the room of large messages, in case that more come."""

import asyncio
import ctypes
import os
import sys
from collections.abc import Callable
from pathlib import Path

_EVERY_S = 1.0
# Growth of the resident memory that is worth a look.
_GROWTH = 1.05
# What made it grow may be in use still, and be freed soon.
_TRIES = 5


async def trim_forever() -> None:
    """Trims the heap when resident memory has grown, until cancelled; returns where that cannot be done."""
    trim = _trimmer()
    if trim is None:
        return
    before, tries = resident_bytes(), 0
    while True:
        await asyncio.sleep(_EVERY_S)
        if resident_bytes() > _GROWTH * before:
            tries = _TRIES
        if tries:
            tries -= 1
            await asyncio.to_thread(trim)  # it releases the interpreter's lock
            before = resident_bytes()


def resident_bytes() -> int:
    """Resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _trimmer() -> Callable[[], None] | None:
    """Glibc's ``malloc_trim``; None on a system that has another C library."""
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return None
    return lambda: trim(0)
