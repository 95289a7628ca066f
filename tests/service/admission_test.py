import asyncio
import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.admission import Admission
from service.errors import Draining, Overloaded


def test_a_permit_is_given_back_however_its_body_ends():
    admission = Admission(max_steps=1, max_bytes=100)
    with admission.permit(10):
        assert admission.steps == 1
    with pytest.raises(KeyError), admission.permit(10):
        raise KeyError
    with admission.permit(100):
        pass
    assert admission.steps == 0


def test_steps_and_bytes_are_limited():
    admission = Admission(max_steps=2, max_bytes=100)
    with admission.permit(60, "a"):
        with pytest.raises(Overloaded, match="bytes"), admission.permit(41, "b"):
            pass
        with admission.permit(40, "b"), pytest.raises(Overloaded, match="2 steps"), admission.permit(0):
            pass
    assert admission.steps == 0


def test_a_chunk_above_the_byte_limit_runs_alone():
    admission = Admission(max_steps=2, max_bytes=100)
    with admission.permit(101), pytest.raises(Overloaded), admission.permit(1):
        pass


def hold(admission, count, nbytes, caller, limit=None):
    for _ in range(count):
        admission.take(nbytes, caller, limit)


def test_one_caller_leaves_a_tenth_of_the_places_to_the_others():
    admission = Admission(max_steps=100, max_bytes=10**6)
    hold(admission, 90, 1, "flood")
    with pytest.raises(Overloaded, match="90 while 90 of them are this caller's"):
        admission.take(1, "flood", None)
    hold(admission, 10, 1, "other")
    with pytest.raises(Overloaded, match="at most 100"):
        admission.take(1, "other", None)
    admission.give_back(1, "flood")
    with pytest.raises(Overloaded):
        admission.take(1, "flood", None)
    admission.take(1, "third", None)


def test_one_caller_leaves_a_tenth_of_the_bytes_to_the_others():
    admission = Admission(max_steps=100, max_bytes=1000)
    hold(admission, 9, 100, "flood")
    with pytest.raises(Overloaded, match="bytes"):
        admission.take(100, "flood", None)
    admission.take(100, "other", None)


def test_a_caller_s_own_limit_holds_and_nothing_is_kept_of_who_has_left():
    admission = Admission(max_steps=100, max_bytes=1000)
    for _ in range(3):
        with admission.permit(1, "a", 1), pytest.raises(Overloaded, match="of this caller"):
            admission.take(1, "a", 1)
        with pytest.raises(Overloaded):
            admission.take(1, "b", 0)
    assert admission._held == {}
    assert (admission.steps, admission.nbytes) == (0, 0)


async def test_draining_refuses_and_waits_for_what_is_under_way():
    admission = Admission(max_steps=2, max_bytes=100)
    with admission.permit(1):
        admission.drain()
        with pytest.raises(Draining), admission.permit(1):
            pass
        idle = asyncio.create_task(admission.idle())
        await asyncio.sleep(0)
        assert not idle.done()
    await idle


@given(
    held=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 40)), max_size=12),
    count=st.integers(1, 8),
    nbytes=st.integers(0, 40),
    limit=st.one_of(st.none(), st.integers(1, 8)),
)
def test_many_steps_at_once_are_taken_where_they_would_be_one_after_the_other(held, count, nbytes, limit):
    def made():
        admission = Admission(max_steps=12, max_bytes=200)
        for caller, size in held:
            with contextlib.suppress(Overloaded):
                admission.take(size, caller, None)
        return admission

    together, single = made(), made()
    before = (together.steps, together.nbytes)
    try:
        hold(single, count, nbytes, "a", limit)
        fit = True
    except Overloaded:
        fit = False
    try:
        together.take(count * nbytes, "a", limit, count)
    except Overloaded:
        assert not fit
        assert (together.steps, together.nbytes) == before
    else:
        assert fit
        assert (together.steps, together.nbytes) == (single.steps, single.nbytes)
        together.give_back(count * nbytes, "a", count)
        assert (together.steps, together.nbytes) == before
