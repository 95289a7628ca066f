"""What the batcher tells the executor of those who are about to come."""

import numpy as np
import pytest

from service.batcher import Batcher, BatchPolicy
from service.types import SessionKey
from tests.service.at_once_test import HereAndNow, Outcome
from tests.service.batching import NEVER, Clock, settle
from tests.service.benches import Bench
from tests.service.support import alike, random_inputs, version_of


class Told(HereAndNow):
    """Keeps what it was told with each batch: how many rows, and whether there is company."""

    def __init__(self):
        super().__init__()
        self.company = []

    def begin(self, key, batch, *, company=False):
        self.company.append((len(batch.lengths), company))
        return super().begin(key, batch)


@pytest.fixture
async def executor():
    return Told()


@pytest.fixture
async def batcher(executor):
    policy = BatchPolicy(max_batch_size=64, max_steps_per_turn=3, executor_timeout=10)
    clock = Clock()
    batcher = Batcher(executor, policy=policy, clock=clock, timer=clock)
    yield batcher
    await batcher.close()


def put(batcher, *sources, steps=1, rows=1):
    for source in sources:
        inputs = np.stack([random_inputs(steps)] * rows)
        batcher.put(version_of(), inputs, [None] * rows, NEVER, Outcome(), source=source)


async def test_one_or_two_who_step_in_turns_are_no_company(executor, batcher):
    for source in "abab":
        put(batcher, source)
        await settle()
    assert executor.company == [(1, False)] * 4


async def test_more_are_until_they_have_not_come_for_a_while(executor, batcher):
    for source in "abcabc":
        put(batcher, source)
        await settle()
    assert [company for _, company in executor.company] == [False, False, True, True, True, True]
    for _ in range(20):
        put(batcher, "a")
        await settle()
    assert executor.company[6] == (1, True)
    assert executor.company[-1] == (1, False)


async def test_those_who_share_a_batch_are_none(executor, batcher):
    put(batcher, *"abcdefgh")
    await settle()
    put(batcher, *"abcdefgh")
    await settle()
    put(batcher, *"abc")
    await settle()
    assert executor.company == [(8, False), (8, False), (4, True)]


async def test_those_who_are_stepped_together_count_once(executor, batcher):
    for source in "abababab":
        put(batcher, source, rows=4)
        await settle()
    assert executor.company == [(4, False)] * 8


async def test_further_turns_of_the_same_are_no_others(executor, batcher):
    put(batcher, "a", "b", "c", steps=9)
    await settle()
    assert executor.company == [(4, False)] * 3
    put(batcher, "d", steps=12)
    put(batcher, "a", steps=12)
    await settle()
    assert [company for _, company in executor.company[3:]] == [False] * 4


async def test_nor_do_they_make_those_forgotten_who_came_before(executor, batcher):
    put(batcher, *"abcdefgh")
    put(batcher, "i", steps=60)
    await settle()
    await settle()
    put(batcher, "a")
    await settle()
    assert len(executor.company) == 22
    assert executor.company[-1] == (1, True)


@pytest.mark.parametrize("way", ["long", "single", "express"])
async def test_every_way_says_whose_step_it_is(way):
    executor = Told()
    async with Bench(executor) as bench:
        keys = [SessionKey("p", name) for name in "abc"]
        for key in keys:
            await bench.create(key)
        for position in range(2):
            for key in keys:
                call = bench.call(random_inputs(1), position, key=key)
                if way == "long":
                    await bench.engine.step(call)
                elif way == "single":
                    await bench.engine.singles.step(call, None)
                else:
                    bench.engine.express.begin(alike([call]), None, lambda steps, places, came: None)
                    await settle()
        assert [company for _, company in executor.company] == [False, False, True, True, True, True]
