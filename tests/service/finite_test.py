"""What is not finite is found wherever it is, in small arrays and in large ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.types import all_finite

# Either side of where another way of looking is taken.
sizes = st.sampled_from([1, 7, 3036, 32 * 1024, 32 * 1024 + 1, 100_000])
large = np.finfo(np.float32).max


@given(sizes, st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_one_value_that_is_not_finite_is_found(size, value, data):
    values = np.full(size, large, np.float32)
    assert all_finite(values, -values)
    values[data.draw(st.integers(0, size - 1))] = value
    assert not all_finite(values)
    assert not all_finite(np.zeros((1, 2), np.float32), values.reshape(1, -1))


@pytest.mark.parametrize("shape", [(0,), (0, 3)])
def test_nothing_is_finite(shape):
    assert all_finite()
    assert all_finite(np.empty(shape, np.float32))


def test_part_of_an_array_is_looked_through_alone():
    values = np.zeros((64, 1024), np.float32)
    values[:, 1] = np.nan
    assert all_finite(values[:, :1], values[:, 2:])
    assert not all_finite(values[:, :2])
