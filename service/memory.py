"""Gives back to the system what was freed: a C library keeps the room of large messages, in case that more come."""

import asyncio
import ctypes
import gc
import sys
import time
from collections.abc import Callable

# A trim that finds nothing costs a few milliseconds of another thread.
_EVERY_S = 3.0
# Looking for cycles stops everything else, the longer the more sessions there are: it gets one part in so many.
_SHARE = 200
# malloc.h, and what each is set to. One heap for the main thread, which then never waits for the others, and one for
# all of these. An end that is longer than a few batches goes back at once; what is larger than that is mapped by
# itself. Left alone, both bounds grow with what was freed, to 64 and 32 MiB.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_SETTINGS = {_M_ARENA_MAX: 2, _M_TRIM_THRESHOLD: 2 * 1024 * 1024, _M_MMAP_THRESHOLD: 4 * 1024 * 1024}


def keep_heaps_short() -> None:
    """Has threads that begin from now on share a heap and not make heaps of their own, where the C library is glibc.

    ``malloc_trim`` does not give back the end of theirs.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        for setting, value in _SETTINGS.items():
            mallopt(setting, value)


async def tidy_forever() -> None:
    """Frees what waits for the garbage collector and gives back what is free every few seconds, until cancelled."""
    trim = _of_glibc("malloc_trim")
    collect_at = 0.0
    while True:
        if (began := time.monotonic()) >= collect_at:
            gc.collect()  # gRPC leaves a cycle for each stream, and in it the stream's last message
            ended = time.monotonic()
            collect_at = ended + _SHARE * (ended - began)
        if trim is not None:
            await asyncio.to_thread(trim, 0)  # it releases the interpreter's lock
        await asyncio.sleep(_EVERY_S)


def _of_glibc(name: str) -> Callable[..., object] | None:
    """A function of glibc; None on a system that has another C library."""
    if sys.platform != "linux":
        return None
    function: Callable[..., object] | None = getattr(ctypes.CDLL(None), name, None)
    return function
