"""Gives back to the system what was freed: a C library keeps the room of large messages, in case that more come."""

import asyncio
import ctypes
import sys
from collections.abc import Callable

# A trim that finds nothing costs a few milliseconds of another thread.
_EVERY_S = 3.0


async def trim_forever() -> None:
    """Trims the heap every few seconds, until cancelled; returns at once where that cannot be done."""
    trim = _trimmer()
    while trim is not None:
        await asyncio.sleep(_EVERY_S)
        await asyncio.to_thread(trim)  # it releases the interpreter's lock


def _trimmer() -> Callable[[], None] | None:
    """Glibc's ``malloc_trim``; None on a system that has another C library."""
    if sys.platform != "linux":
        return None
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return None
    return lambda: trim(0)
