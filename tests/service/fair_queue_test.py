from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.fair_queue import FairQueue


class Item(NamedTuple):
    caller: str
    number: int


def queue_of(*items):
    queue = FairQueue()
    for item in items:
        queue.append(item)
    return queue


def emptied(queue):
    return [queue.popleft() for _ in range(len(queue))]


def test_one_caller_is_served_in_order():
    items = [Item("a", number) for number in range(5)]
    assert emptied(queue_of(*items)) == items


def test_callers_take_turns_whatever_the_length_of_their_queues():
    flood = [Item("flood", number) for number in range(1000)]
    queue = queue_of(*flood, Item("b", 0), Item("c", 0), Item("b", 1))
    first = [queue.popleft() for _ in range(6)]
    assert [item.caller for item in first] == ["flood", "b", "c", "flood", "b", "flood"]
    assert emptied(queue) == flood[3:]
    with pytest.raises(IndexError):
        queue.popleft()


@given(st.lists(st.one_of(st.sampled_from("abc"), st.none()), max_size=60))
def test_nothing_is_lost_and_each_caller_keeps_its_order(operations):
    queue, put, taken = FairQueue(), [], []
    for number, caller in enumerate(operations):
        if caller is not None:
            put.append(Item(caller, number))
            queue.append(put[-1])
        elif len(queue):
            taken.append(queue.popleft())
        assert sorted(queue) == sorted(set(put) - set(taken))
        assert len(queue) == len(put) - len(taken)
    taken += emptied(queue)
    for caller in "abc":
        assert [item for item in taken if item.caller == caller] == [item for item in put if item.caller == caller]


def test_what_is_not_wanted_is_dropped():
    queue = queue_of(*(Item(caller, number) for number in range(4) for caller in "ab"))
    queue.keep(lambda item: item.caller == "a" and item.number % 2)
    assert emptied(queue) == [Item("a", 1), Item("a", 3)]
