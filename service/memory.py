"""The C library's heaps: long while batches run, short again soon after.

A batch takes some megabytes and frees them. Given back to the system each time, they would be fetched again for the
next one, page by page (docs/design.md); so they are kept, and given back every few seconds.
"""

import asyncio
import ctypes
import functools
import gc
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

# gRPC leaves a cycle of references for each call, and one more for a stream that fails, with its last message in it:
# the collector's first generations, where such things are, are looked through this often.
_EVERY_S, _YOUNG = 0.5, 1
# Looking for cycles everywhere stops everything else, the longer the more sessions there are: it gets one part in so
# many. A trim that finds nothing costs a few milliseconds of another thread.
_TRIM_EVERY_S, _SHARE = 3.0, 200
# malloc.h. One heap for the main thread and three for the others: those that share one wait for each other.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_HEAPS = 4
# What is larger than this is mapped by itself, and goes back at once.
_MAPPED_BYTES = 32 * 1024 * 1024
# The end of a heap goes back when it is free and as long as this: while batches run, and when it is tidied.
_KEPT_BYTES, _TIDY_BYTES = 64 * 1024 * 1024, 64 * 1024
# What stays of it, and how much more than was asked for a heap grows by.
_KEPT_PAD, _TIDY_PAD = 128 * 1024, 0
# Of each of these sizes a thread keeps so many chunks for itself that it has freed (malloc.c, "tcache").
_CACHED_SIZES, _CACHED = range(24, 1033, 16), 7


class Heaps:
    """The heaps of this process, where its C library is glibc; of another it changes nothing.

    Has to be made before the threads that allocate. ``malloc_trim`` does not give back the end of any heap but the main
    thread's: that goes when something is freed in it. So there is a thread for each heap, and which heap a thread takes
    from is settled by the first that it takes.
    """

    def __init__(self) -> None:
        self._glibc = ctypes.CDLL(None) if _is_glibc() else None
        self._keepers: list[ThreadPoolExecutor] = []
        self._trimming = threading.Lock()
        if self._glibc is None:
            return
        self._glibc.malloc.restype, self._glibc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        self._glibc.free.restype, self._glibc.free.argtypes = None, [ctypes.c_void_p]
        self._glibc.mallopt(_M_ARENA_MAX, _HEAPS)
        self._glibc.mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)
        self._glibc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        self._glibc.mallopt(_M_TOP_PAD, _KEPT_PAD)
        for number in range(1, _HEAPS):
            keeper = ThreadPoolExecutor(1, f"heap-{number}")
            keeper.submit(_shorten, self._glibc).result()
            self._keepers.append(keeper)

    def cached(self) -> list[int]:
        """Takes the chunks that this thread keeps for itself, each on a page that cannot go back; for ``trim``."""
        if self._glibc is None:
            return []
        malloc = self._glibc.malloc
        return [malloc(size) for size in _CACHED_SIZES for _ in range(_CACHED)]

    def trim(self, cached: Sequence[int] = ()) -> None:
        """Gives back what is free. Takes some milliseconds, and not the interpreter's lock.

        Args:
            cached: Chunks to free first, in a thread that keeps as many for itself already.
        """
        if self._glibc is None:
            return
        with self._trimming:
            self._glibc.mallopt(_M_TOP_PAD, _TIDY_PAD)
            self._glibc.mallopt(_M_TRIM_THRESHOLD, _TIDY_BYTES)
            self._keepers[0].submit(_free, self._glibc, cached).result()
            for keeper in self._keepers:
                keeper.submit(_shorten, self._glibc).result()
            self._glibc.malloc_trim(0)
            self._glibc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
            self._glibc.mallopt(_M_TOP_PAD, _KEPT_PAD)


@functools.cache
def heaps() -> Heaps:
    """This process's: they are one to a process."""
    return Heaps()


async def tidy_forever() -> None:
    """Frees what waits for the garbage collector, and gives back what is free, every now and then, until cancelled."""
    trim_at = collect_at = 0.0
    while True:
        gc.collect(_YOUNG)
        if (began := time.monotonic()) >= trim_at:
            if began >= collect_at:
                gc.collect()
                ended = time.monotonic()
                collect_at = ended + _SHARE * (ended - began)
            await asyncio.to_thread(heaps().trim, heaps().cached())
            trim_at = began + _TRIM_EVERY_S
        await asyncio.sleep(_EVERY_S)


def _free(glibc: ctypes.CDLL, chunks: Sequence[int]) -> None:
    for chunk in chunks:
        glibc.free(chunk)


def _shorten(glibc: ctypes.CDLL) -> None:
    """Gives back the end of the calling thread's heap."""
    glibc.free(glibc.malloc(2 * _TIDY_BYTES))


def _is_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim")
