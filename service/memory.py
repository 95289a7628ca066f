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
_M_ARENA_MAX = -8  # malloc.h


def share_one_heap() -> None:
    """Has threads that begin from now on share one heap, where the C library is glibc, and not make heaps of their own.

    Of those, ``malloc_trim`` does not give back the end.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)


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
