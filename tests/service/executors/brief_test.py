"""Batches that are over so soon that they are run where they are, and those that are not."""

import asyncio
import math
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest

from service.errors import BadModelOutput
from service.executors.brief import BriefRuns, Load
from service.executors.embedded import EmbeddedExecutor
from service.executors.idle_poll import IdlePoll
from service.executors.saved_model import SavedModel
from service.types import StepBatch, StepBatchResult, VersionKey
from tests.service.executors.sequence_models import WIDTH, assert_close, expected, export_sums

KEY = VersionKey("sums", 1)


def test_a_kind_is_brief_once_enough_of_its_runs_were_and_until_one_was_not() -> None:
    runs = BriefRuns()
    for _ in range(8):
        assert not runs.expected("a")
        runs.note("a", 50e-6)
    assert runs.expected("a")
    assert not runs.expected("b")
    runs.note("a", 0.03)
    for _ in range(37):  # 0.03 * 0.9 ** 37 is still more than 0.6 ms
        assert not runs.expected("a")
        runs.note("a", 50e-6)
    runs.note("a", 50e-6)
    assert runs.expected("a")


class Work:
    """A thread's clocks, moved by hand."""

    def __init__(self) -> None:
        self.now = self.worked = 100.0

    def load(self) -> Load:
        return Load(cpu=lambda: self.worked, clock=lambda: self.now)

    def pass_time(self, seconds: float, share: float) -> None:
        self.now += seconds
        self.worked += share * seconds


def test_large_runs_may_fill_the_time_that_a_thread_has_left_and_small_ones_may_not() -> None:
    work = Work()
    load = work.load()
    assert not load.leaves_time(1)  # nothing is known yet
    assert not load.leaves_time(64)
    seen = []
    for share, runs in ((0.6, 0.0), (0.95, 0.0), (0.95, 0.3), (0.99, 0.4), (0.99, 0.1), (0.0, 0.0)):
        work.pass_time(0.05, share)
        load.ran(runs * 0.05)
        seen.append((load.leaves_time(1), load.leaves_time(64)))
    assert seen == [(True, True), (False, False), (False, True), (False, True), (False, False), (True, True)]
    work.pass_time(0.01, 1.0)
    assert load.leaves_time(1)  # it is too early to say anything else
    work.pass_time(0.01, 1.0)
    assert not load.leaves_time(1)


def test_with_company_small_runs_are_left_to_others_sooner_and_those_left_count() -> None:
    work = Work()
    load = work.load()
    assert not load.leaves_time(1, company=True)  # nothing is known yet
    seen = []
    for share, left in ((0.6, 0.0), (0.8, 0.0), (0.6, 0.3), (0.6, 0.0), (0.95, 0.0)):
        work.pass_time(0.05, share)
        load.left(left * 0.05)
        seen.append((load.leaves_time(1, company=True), load.leaves_time(1), load.leaves_time(64, company=True)))
    assert seen == [
        (True, True, True),
        (False, True, False),  # of many rows, what the thread does besides runs decides
        (False, True, True),
        (True, True, True),
        (False, False, False),
    ]
    work.pass_time(0.05, 1.0)
    load.ran(0.4 * 0.05)
    assert load.leaves_time(64, company=True)
    assert not load.leaves_time(1, company=True, beside=True)


def batch_of(rows: int, steps: int = 1) -> StepBatch:
    """Padded as the batcher pads it: the time axis has the length that is compiled."""
    inputs = np.zeros((rows, 4, WIDTH), np.float32)
    inputs[:, :steps] = np.arange(1, 1 + rows * steps * WIDTH).reshape(rows, steps, WIDTH)
    return StepBatch(
        inputs=inputs,
        lengths=np.full(rows, steps, np.int32),
        reset=np.zeros(rows, np.bool_),
        state=np.ones((rows, WIDTH), np.float32),
    )


class Threads:
    """Counts the runs of all models by whether they were run on this thread; ``spoil`` fails those on this one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.here = self.elsewhere = 0
        self.spoil = False
        mine, run = threading.current_thread(), SavedModel.run

        def counted(model: SavedModel, batch: StepBatch) -> StepBatchResult:
            if threading.current_thread() is not mine:
                self.elsewhere += 1
            else:
                self.here += 1
                if self.spoil:
                    raise BadModelOutput("spoilt")
            return run(model, batch)

        monkeypatch.setattr(SavedModel, "run", counted)


@pytest.fixture
async def executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EmbeddedExecutor]:
    # What a run takes on a machine that does other things is not for a test to say.
    monkeypatch.setattr("service.executors.brief._BRIEF_S", math.inf)
    monkeypatch.setattr("service.executors.brief._MOST_WORK", math.inf)
    monkeypatch.setattr("service.executors.brief._WINDOW_S", 0.0)
    monkeypatch.setattr("service.executors.embedded._BRIEF_CELLS", 8)
    export_sums(tmp_path)
    executor = EmbeddedExecutor(tmp_path, max_batch_size=8, max_steps=4, threads=1)
    await executor.start()
    assert await executor.wait_compiled(120)
    yield executor
    await executor.close()


async def test_brief_batches_run_where_they_are_and_give_the_same(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    for _ in range(12):
        batch = batch_of(1)
        assert_close(await executor.step(KEY, batch), expected(batch))
    assert (threads.elsewhere, threads.here) == (8, 4)
    run = executor.begin(KEY, batch_of(1))
    assert run.done()  # nobody has to be woken up for it
    for _ in range(12):  # not of few enough steps, whatever they take
        large = batch_of(8, 2)
        assert_close(await executor.step(KEY, large), expected(large))
    assert threads.here == 5


def next_look(poll: IdlePoll) -> asyncio.Handle | None:
    return poll._next_look


async def test_after_a_brief_step_that_was_alone_the_loop_looks_for_the_next_one(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    executor._idle_poll = poll = IdlePoll(60.0)
    for _ in range(8):
        await executor.step(KEY, batch_of(1))
        await executor.step(KEY, batch_of(2))
        assert next_look(poll) is None  # they ran in a thread
    for _ in range(2):  # the second one comes soon after the first
        await executor.step(KEY, batch_of(1))
    looked = next_look(poll)
    assert looked is not None
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert next_look(poll) not in (None, looked)  # it does so at every turn
    await executor.step(KEY, batch_of(2))  # of several callers
    assert next_look(poll) is None
    assert threads.here == 3


async def test_what_the_loop_looks_does_not_count_as_work(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.executors.brief._MOST_WORK", 0.0)
    threads = Threads(monkeypatch)
    for _ in range(9):
        await executor.step(KEY, batch_of(1))
    assert (threads.elsewhere, threads.here) == (9, 0)
    executor._idle_poll._polled += 3600.0  # more than all that it has done
    await executor.step(KEY, batch_of(1))
    assert threads.here == 1


async def test_beside_a_batch_in_a_thread_the_loop_does_not_look_for_more(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.executors.brief._MOST_BESIDE", math.inf)
    threads = Threads(monkeypatch)
    executor._idle_poll = poll = IdlePoll(60.0)
    for _ in range(10):
        await executor.step(KEY, batch_of(1))
    beside = executor.begin(KEY, batch_of(8, 2))
    assert executor.begin(KEY, batch_of(1)).done()
    assert next_look(poll) is None
    await beside
    assert threads.here == 3


async def test_a_thread_that_has_a_lot_to_do_leaves_them_to_others(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.executors.brief._MOST_WORK", -1.0)
    threads = Threads(monkeypatch)
    for _ in range(10):
        await executor.step(KEY, batch_of(1))
    assert (threads.elsewhere, threads.here) == (10, 0)
    monkeypatch.setattr("service.executors.brief._MOST_WORK", math.inf)
    await executor.step(KEY, batch_of(1))
    assert threads.here == 1


async def test_where_others_are_about_to_come_a_thread_takes_them_once_the_loop_has_much_to_do(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.executors.brief._MOST_WITH_COMPANY", math.inf)
    threads = Threads(monkeypatch)
    for _ in range(8):
        await executor.step(KEY, batch_of(1))
    await executor.begin(KEY, batch_of(1), company=True)
    assert (threads.elsewhere, threads.here) == (8, 1)
    for _ in range(9):
        await executor.step(KEY, batch_of(2))
    assert threads.here == 2
    left: list[float] = []
    monkeypatch.setattr(executor._load_here, "left", left.append)
    monkeypatch.setattr("service.executors.brief._MOST_WITH_COMPANY", -1.0)
    expected_of_one = executor._brief.seconds((KEY, 1, 1))
    await executor.begin(KEY, batch_of(1), company=True)
    await executor.begin(KEY, batch_of(8, 2), company=True)  # would not have run on the loop's thread
    assert threads.here == 2
    assert left == [expected_of_one]
    assert expected_of_one > 0
    await executor.begin(KEY, batch_of(1))
    assert threads.here == 3


@pytest.mark.parametrize(("most", "here"), [(math.inf, 1), (-1.0, 0)])
async def test_beside_a_longer_batch_a_brief_one_runs_on_a_loop_that_has_much_time_left(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch, most: float, here: int
) -> None:
    monkeypatch.setattr("service.executors.brief._MOST_BESIDE", most)
    threads = Threads(monkeypatch)
    for _ in range(8):
        await executor.step(KEY, batch_of(1))
    beside = executor.begin(KEY, batch_of(8, 2))
    await asyncio.gather(executor.begin(KEY, batch_of(1)), beside)
    assert (threads.elsewhere, threads.here) == (10 - here, here)


async def test_beside_a_small_batch_in_a_thread_a_brief_one_goes_to_a_thread_too(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.executors.brief._MOST_BESIDE", math.inf)
    threads = Threads(monkeypatch)
    for _ in range(8):
        await executor.step(KEY, batch_of(1))
    beside = executor.begin(KEY, batch_of(2))  # not seen to be brief yet
    await asyncio.gather(executor.begin(KEY, batch_of(1)), beside)
    assert (threads.elsewhere, threads.here) == (10, 0)


async def test_a_brief_batch_that_fails_fails_as_in_a_thread(
    executor: EmbeddedExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = Threads(monkeypatch)
    for _ in range(8):
        await executor.step(KEY, batch_of(1))
    threads.spoil = True
    run = executor.begin(KEY, batch_of(1))
    with pytest.raises(BadModelOutput):
        await run
    assert threads.here == 1
