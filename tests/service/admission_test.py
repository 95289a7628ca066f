import asyncio

import pytest

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
    with admission.permit(60):
        with pytest.raises(Overloaded, match="bytes"), admission.permit(41):
            pass
        with admission.permit(40), pytest.raises(Overloaded, match="2 steps"), admission.permit(0):
            pass
    assert admission.steps == 0


def test_a_chunk_above_the_byte_limit_runs_alone():
    admission = Admission(max_steps=2, max_bytes=100)
    with admission.permit(101), pytest.raises(Overloaded), admission.permit(1):
        pass


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
