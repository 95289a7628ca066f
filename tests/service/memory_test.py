"""What is freed goes back to the system."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import weakref

from service.memory import tidy_forever

# Three threads that hold memory for as long as the heaps are counted, which glibc tells on a file of C's.
COUNT_HEAPS = """
import ctypes, sys, threading
from service.memory import keep_heaps_short
if sys.argv[1] == "shared":
    keep_heaps_short()
held, counted = threading.Barrier(4), threading.Event()
def hold():
    kept = [bytes(5000) for _ in range(100)]
    held.wait()
    counted.wait()
threads = [threading.Thread(target=hold) for _ in range(3)]
for thread in threads:
    thread.start()
held.wait()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
counted.set()
"""


def heaps(how):
    told = subprocess.run([sys.executable, "-c", COUNT_HEAPS, how], check=True, capture_output=True, text=True)
    return told.stdout.count("<heap nr=")


def test_the_threads_beside_the_main_one_share_a_heap():
    assert heaps("each its own") > 2
    assert heaps("shared") == 2


class Knot:
    """An object in a cycle of references."""

    def __init__(self):
        self.itself = self


async def test_what_waits_for_the_garbage_collector_is_freed():
    gc.disable()
    try:
        gone = asyncio.Event()
        weakref.finalize(Knot(), gone.set)
        tidying = asyncio.create_task(tidy_forever())
        await asyncio.wait_for(gone.wait(), 60)
    finally:
        gc.enable()
    tidying.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tidying


# What batches leave, in bytes. Python's table of interned strings would double after some thousand keys of dictionaries
# that NumPy makes, if each batch asked for one.
COUNT_LEFT = """
import tracemalloc
from service.types import empty_batch
tracemalloc.start()
empty_batch(1, 1, 2, 3)
before, _ = tracemalloc.get_traced_memory()
for _ in range(20_000):
    empty_batch(1, 1, 2, 3)
print(tracemalloc.get_traced_memory()[0] - before)
"""


def test_batches_leave_nothing_in_the_table_of_interned_strings():
    told = subprocess.run([sys.executable, "-c", COUNT_LEFT], check=True, capture_output=True, text=True)
    assert int(told.stdout) < 64 * 1024
