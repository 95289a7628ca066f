import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.fair_queue import FairQueue


class Item:
    """Rows numbered from ``number`` on."""

    def __init__(self, caller, number, rows=1):
        self.caller = caller
        self.number = number
        self.size = rows

    def __eq__(self, other):
        return vars(self) == vars(other)

    def __repr__(self):
        return f"Item({self.caller!r}, {self.number}, {self.size})"

    def split(self, count):
        head = Item(self.caller, self.number, count)
        self.number, self.size = self.number + count, self.size - count
        return head


def queue_of(*items):
    queue = FairQueue()
    for item in items:
        queue.append(item)
    return queue


def emptied(queue):
    items = []
    while len(queue):
        items.append(queue.take(1))
    return items


def test_one_caller_is_served_in_order():
    items = [Item("a", number) for number in range(5)]
    assert emptied(queue_of(*items)) == items


def test_callers_take_turns_whatever_the_length_of_their_queues():
    flood = [Item("flood", number) for number in range(1000)]
    queue = queue_of(*flood, Item("b", 0), Item("c", 0), Item("b", 1))
    first = [queue.take(1) for _ in range(6)]
    assert [item.caller for item in first] == ["flood", "b", "c", "flood", "b", "flood"]
    assert emptied(queue) == flood[3:]
    with pytest.raises(IndexError):
        queue.take(1)


def test_a_turn_takes_at_most_so_many_rows_of_an_item_and_leaves_the_others_first():
    queue = queue_of(Item("a", 0, rows=5), Item("a", 5, rows=2), Item("b", 0, rows=2))
    assert (len(queue), queue.callers) == (9, 2)
    assert [queue.take(3) for _ in range(2)] == [Item("a", 0, rows=3), Item("b", 0, rows=2)]
    assert (len(queue), queue.callers) == (4, 1)
    assert [queue.take(3) for _ in range(2)] == [Item("a", 3, rows=2), Item("a", 5, rows=2)]
    assert (len(queue), queue.callers) == (0, 0)


def test_small_items_are_taken_of_each_caller_and_the_others_keep_their_turns():
    big = Item("a", 0, rows=9)
    queue = queue_of(big, Item("b", 0), Item("b", 1), Item("c", 0, rows=2), Item("d", 0))
    assert list(queue.take_small(2, 4)) == [Item("b", 0), Item("c", 0, rows=2), Item("d", 0)]
    assert (len(queue), queue.callers) == (10, 2)
    assert queue.take(4) == Item("a", 0, rows=4)
    assert list(queue.take_small(9, 1)) == [Item("b", 1)]  # of one caller: whose turn it is
    assert emptied(queue)[0] == Item("a", 4)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), st.sampled_from("abc"), st.integers(1, 5)),
            st.tuples(st.just("take"), st.integers(1, 4)),
            st.tuples(st.just("take small"), st.integers(1, 4), st.integers(1, 3)),
        ),
        max_size=60,
    )
)
def test_nothing_is_lost_and_each_caller_keeps_its_order(operations):
    queue, put, taken = FairQueue(), [], []
    for operation, *arguments in operations:
        if operation == "put":
            caller, rows = arguments
            item = Item(caller, sum(one == caller for one, _ in put), rows)
            put += [(caller, item.number + row) for row in range(rows)]
            queue.append(item)
        elif operation == "take small":
            came = list(queue.take_small(*arguments))
            assert len({item.caller for item in came}) == len(came) <= arguments[1]
            assert all(item.size <= arguments[0] for item in came)
            taken += [(item.caller, item.number + row) for item in came for row in range(item.size)]
        elif len(queue):
            most = arguments[0]
            item = queue.take(most)
            assert 1 <= item.size <= most
            taken += [(item.caller, item.number + row) for row in range(item.size)]
        assert len(queue) == len(put) - len(taken)
        assert queue.callers == len({caller for caller, _ in set(put) - set(taken)})
    taken += [(item.caller, item.number) for item in emptied(queue)]
    for caller in "abc":
        assert [one for one in taken if one[0] == caller] == [one for one in put if one[0] == caller]


def test_what_is_not_wanted_is_dropped():
    queue = queue_of(*(Item(caller, number) for number in range(4) for caller in "ab"))
    queue.keep(lambda item: item.caller == "a" and item.number % 2)
    assert emptied(queue) == [Item("a", 1), Item("a", 3)]
