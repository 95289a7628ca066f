"""What is freed goes back to the system."""

import asyncio
import contextlib
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

from service.memory import tidy_forever

# Eight threads that hold memory for as long as the heaps are counted, which glibc tells on a file of C's.
COUNT_HEAPS = """
import ctypes, sys, threading
from service.memory import heaps
if sys.argv[1] == "few":
    heaps()
held, counted = threading.Barrier(9), threading.Event()
def hold():
    kept = [bytes(5000) for _ in range(100)]
    held.wait()
    counted.wait()
threads = [threading.Thread(target=hold) for _ in range(8)]
for thread in threads:
    thread.start()
held.wait()
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
libc.fflush(None)
counted.set()
"""

# The resident MiB before, with and after what eight threads take, in whichever heaps these take from, and once more
# after the heaps were tidied. What stays is in none of the heaps, or is the main thread's.
FILL_HEAPS = """
import threading
from service.memory import heaps
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
kept = heaps()
taken, seen = threading.Barrier(9), threading.Barrier(9)
def take():
    held = [bytes(5000) for _ in range(1000)]
    taken.wait()
    seen.wait()
threads = [threading.Thread(target=take) for _ in range(8)]
before = resident()
for thread in threads:
    thread.start()
taken.wait()
full = resident()
seen.wait()
for thread in threads:
    thread.join()
freed = resident()
kept.trim()
print(before, full, freed, resident())
"""


def run(script, *arguments):
    return subprocess.run([sys.executable, "-c", script, *arguments], check=True, capture_output=True, text=True).stdout


def heaps(how):
    return run(COUNT_HEAPS, how).count("<heap nr=")


def test_threads_share_a_few_heaps():
    assert heaps("as many as there are threads") > 4
    assert heaps("few") == 4


def test_what_is_freed_is_kept_until_the_heaps_are_tidied_and_goes_back_then_from_all_of_them():
    before, full, freed, tidied = map(float, run(FILL_HEAPS).split())
    assert full - before > 35
    assert freed - before > 25
    assert tidied - before < 3


# Whether what a thread freed last is among the chunks that are taken from its own store of them, and how many MiB more
# are resident once this was done often: another thread has to free them.
EMPTY_CACHE = """
import ctypes
from service.memory import heaps
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
kept = heaps()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
chunks = [libc.malloc(size) for size in (24, 200, 1032)]
for chunk in chunks:
    libc.free(chunk)
cached = kept.cached()
kept.trim(cached)
before = resident()
for _ in range(200):
    kept.trim(kept.cached())
print(set(chunks) <= set(cached), resident() - before)
"""


def test_what_a_thread_keeps_for_itself_is_freed_too():
    taken, grown = run(EMPTY_CACHE).split()
    assert taken == "True"
    assert float(grown) < 5


# How many objects a look for cycles goes through once TensorFlow is there, and whether it still finds what came later.
COUNT_LOOKED_THROUGH = """
import gc, weakref
from service.executors.saved_model import import_tensorflow
before = len(gc.get_objects())
import_tensorflow()
print(len(gc.get_objects()) - before)
class Knot:
    def __init__(self):
        self.itself = self
found = weakref.ref(Knot())
gc.collect()
print(found() is None)
"""


def test_what_tensorflow_brings_along_is_not_looked_through_each_time():
    more, found = run(COUNT_LOOKED_THROUGH).split()
    assert int(more) < 10_000  # of the 280,000 that its import makes
    assert found == "True"


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


async def test_young_objects_are_looked_through_more_often_than_all(monkeypatch):
    looked, often = [], asyncio.Event()

    def collect(generation=2):
        looked.append(generation)
        if looked.count(1) == 3:
            often.set()

    monkeypatch.setattr(gc, "collect", collect)
    monkeypatch.setattr("service.memory.time", SimpleNamespace(monotonic=lambda: 0.0))  # no time passes meanwhile
    tidying = asyncio.create_task(tidy_forever())
    await asyncio.wait_for(often.wait(), 60)
    tidying.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await tidying
    assert looked.count(2) == 1


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
    assert int(run(COUNT_LEFT)) < 64 * 1024
