"""A loop that looks for the next step before it sleeps: when it does, for how long, and what that counts as."""

from collections.abc import Callable
from typing import Any

from service.executors.idle_poll import IdlePoll

LIMIT = 0.25  # seconds; like all times here a sum of powers of two


class Handle:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class Thread:
    """A loop's thread: its clocks are moved by hand, and what it was asked to call soon is called when it turns."""

    def __init__(self, limit: float = LIMIT) -> None:
        self.now = self.cpu = 64.0
        self.handles: list[Handle] = []
        loop: Any = self
        self.poll = IdlePoll(limit, clock=lambda: self.now, cpu=lambda: self.cpu, loop=lambda: loop)

    def call_soon(self, call: Callable[[], None]) -> Handle:
        self.handles.append(Handle(call))
        return self.handles[-1]

    def turn(self, seconds: float = 0.0) -> bool:
        """Works so long, then one turn of the loop; returns whether it would look again instead of going to sleep."""
        self.now += seconds
        self.cpu += seconds
        handles, self.handles = self.handles, []
        for handle in handles:
            if not handle.cancelled:
                handle.call()
        return any(not handle.cancelled for handle in self.handles)

    def wait(self, seconds: float) -> None:
        """Sleeps until a step comes."""
        self.now += seconds
        self.poll.end()


def test_it_looks_where_the_last_step_came_in_time() -> None:
    thread = Thread()
    thread.poll.end()  # the very first step
    thread.poll.begin()
    assert not thread.turn()  # nothing is known yet
    thread.wait(0.125)
    thread.poll.begin()
    assert all(thread.turn(0.0625) for _ in range(3))
    thread.poll.end()
    assert not thread.turn()
    thread.poll.begin()
    assert thread.turn()


def test_it_looks_no_longer_than_its_limit_and_then_not_until_a_step_comes_in_time_again() -> None:
    thread = Thread()
    thread.poll.begin()
    thread.wait(0.125)
    thread.poll.begin()
    assert [thread.turn(0.0625) for _ in range(5)] == [True, True, True, False, False]
    thread.wait(1.0)
    for seconds, looks in ((0.25, False), (0.2, False), (0.5, True), (0.1, False), (0.1, True)):
        thread.poll.begin()
        assert thread.turn() is looks
        thread.wait(seconds)


def test_what_it_looks_is_no_work_and_all_else_is() -> None:
    thread = Thread()
    thread.poll.begin()
    thread.wait(0.125)
    before = thread.poll.worked()
    thread.poll.begin()
    thread.turn(0.03125)  # answers the last step
    for _ in range(4):
        thread.turn(0.015625)  # looks
    thread.poll.end()
    thread.turn(0.5)  # another step
    assert thread.poll.worked() - before == 0.03125 + 0.5


def test_who_begins_again_while_it_looks_looks_once() -> None:
    thread = Thread()
    thread.poll.begin()
    thread.wait(0.125)
    for _ in range(3):
        thread.poll.begin()
        thread.turn()
    assert len(thread.handles) == 1
    for _ in range(3):
        thread.poll.end()
        thread.poll.begin()
    assert sum(not handle.cancelled for handle in thread.handles) == 1


def test_without_a_limit_it_never_looks() -> None:
    thread = Thread(0.0)
    for _ in range(3):
        thread.poll.begin()
        assert not thread.turn()
        thread.wait(0.0)
