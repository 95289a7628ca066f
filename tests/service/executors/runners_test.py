"""Threads that run batches: what is asked of them comes back, once, or not at all where it was given up."""

import asyncio
import gc
import threading
import weakref

import pytest

from service.executors.runners import Runners


@pytest.fixture
async def runners():
    runners = Runners(2, "runner", 0)
    yield runners
    runners.close()
    await asyncio.to_thread(runners.join, 10)


async def test_results_and_errors_come_back_on_the_loop(runners):
    assert await runners.run(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        await runners.run(lambda: 1 // 0)
    assert await runners.run(threading.current_thread) is not threading.current_thread()


async def test_there_are_as_many_threads_as_are_needed_and_no_more(runners):
    for _ in range(5):
        await runners.run(lambda: None)
    assert len(runners._threads) == 1
    gate, begun = threading.Event(), threading.Semaphore(0)

    def wait():
        begun.release()
        return gate.wait(10)

    runs = [runners.run(wait) for _ in range(3)]
    for _ in range(2):  # side by side
        assert await asyncio.to_thread(begun.acquire, timeout=10)
    assert not begun.acquire(blocking=False)
    gate.set()
    assert await asyncio.gather(*runs) == [True] * 3
    assert len(runners._threads) == 2


async def test_what_is_cancelled_before_it_has_begun_never_begins(runners):
    gate, ran = threading.Event(), []
    first = [runners.run(lambda: gate.wait(10)) for _ in range(2)]
    waiting = runners.run(lambda: ran.append(1))
    waiting.cancel()
    gate.set()
    await asyncio.gather(*first)
    await runners.run(lambda: None)
    await runners.run(lambda: None)
    assert not ran


async def test_what_is_cancelled_while_it_runs_ends_unheard(runners):
    gate, begun, ended = threading.Event(), threading.Event(), threading.Event()

    def work():
        begun.set()
        gate.wait(10)
        ended.set()

    run = runners.run(work)
    await asyncio.to_thread(begun.wait, 10)
    run.cancel()
    gate.set()
    await asyncio.to_thread(ended.wait, 10)
    await runners.run(lambda: None)
    assert run.cancelled()
    assert runners._under_way == 0


async def test_closed_runners_end_what_waits_and_take_nothing_more(runners):
    ran = []
    runs = [runners.run(lambda: ran.append(1)) for _ in range(5)]
    runners.close()
    with pytest.raises(RuntimeError):
        runners.run(lambda: None)
    await asyncio.gather(*runs)
    await asyncio.to_thread(runners.join, 10)
    assert len(ran) == 5
    assert not any(thread.is_alive() for thread in runners._threads)


async def test_an_idle_thread_holds_on_to_nothing(runners):
    class Batch:
        def run(self):
            return self

    batch = Batch()
    seen = weakref.ref(batch)
    assert await runners.run(batch.run) is batch
    await runners.run(lambda: None)  # on the same thread: the one before is over and forgotten
    del batch
    gc.collect()
    assert seen() is None


def test_a_loop_that_is_closed_hears_nothing_more():
    gate = threading.Event()

    async def leave():
        runners = Runners(1, "runner", 0)
        runners.run(lambda: gate.wait(10))
        return runners

    runners = asyncio.run(leave())
    gate.set()
    runners.join(10)
    assert not any(thread.is_alive() for thread in runners._threads)
