import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.turns import Turns
from service.types import SessionKey

KEY = SessionKey("p", "a")


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


async def test_first_come_first_served():
    turns, order, go = Turns(), [], asyncio.Event()

    async def hold(name):
        async with turns.of(KEY):
            order.append(name)
            await go.wait()

    tasks = [asyncio.create_task(hold(number)) for number in range(4)]
    await settle()
    assert order == [0]
    go.set()
    await asyncio.gather(*tasks)
    assert order == [0, 1, 2, 3]


async def test_sessions_do_not_wait_for_each_other():
    turns = Turns()
    async with turns.of(KEY), turns.of(SessionKey("q", "a")), turns.of(SessionKey("p", "b")):
        pass


async def test_nothing_is_kept_for_a_session_that_nobody_steps():
    turns = Turns()
    async with turns.of(KEY):
        assert turns.held == {KEY}
    assert (len(turns.held), len(turns._waiting)) == (0, 0)


async def test_turns_that_are_let_go_of_together_go_to_those_who_wait():
    turns, keys = Turns(), [SessionKey("p", name) for name in "abc"]
    turns.take(keys)
    waiting = turns.wait(keys[1])
    turns.release(keys)
    assert waiting.done()
    assert turns.held == {keys[1]}
    turns.release(keys[1:2])
    assert not turns.held


@pytest.mark.parametrize("waits", [False, True])
async def test_a_turn_that_nobody_holds_cannot_be_let_go_of(waits):
    turns, other = Turns(), SessionKey("p", "b")
    turns.take([KEY, other])
    if waits:
        turns.wait(other)
    with pytest.raises(KeyError):
        turns.release([KEY, KEY])
    with pytest.raises(KeyError):
        turns.release_one(KEY)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 8)), max_size=12), st.integers(2, 6))
def test_whoever_is_cancelled_the_others_get_their_turn_one_at_a_time(cancels, tasks_count):
    async def run():
        turns, inside, through = Turns(), 0, []

        async def hold(name):
            nonlocal inside
            async with turns.of(KEY):
                inside += 1
                assert inside == 1
                try:
                    await asyncio.sleep(0)
                finally:
                    inside -= 1
                through.append(name)

        tasks = [asyncio.create_task(hold(number)) for number in range(tasks_count)]
        for ticks, victim in cancels:
            for _ in range(ticks):
                await asyncio.sleep(0)
            if victim < len(tasks):
                tasks[victim].cancel()
        async with asyncio.timeout(5):
            await asyncio.gather(*tasks, return_exceptions=True)
        assert through == [number for number, task in enumerate(tasks) if not task.cancelled()]
        assert (len(turns.held), len(turns._waiting)) == (0, 0)

    asyncio.run(run())
