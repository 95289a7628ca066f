"""Digests of many steps: those of each, whenever they are found."""

import numpy as np
import pytest

from service import codec
from service.codec import render_tensor
from service.digests import Digests, digest_of

INPUTS = np.random.default_rng(0).random((5, 3, 2), np.float32)


def test_each_is_what_the_step_by_itself_has():
    alone = [codec.parse_inputs(render_tensor(inputs), 1000)[1] for inputs in INPUTS]
    assert list(Digests(INPUTS)) == alone
    assert [digest_of(inputs.tobytes(), 3, 2) for inputs in INPUTS] == alone
    assert len(set(alone)) == len(INPUTS)


def test_the_same_bytes_in_another_shape_are_another_step():
    assert digest_of(bytes(24), 3, 2) != digest_of(bytes(24), 2, 3)


@pytest.mark.parametrize("places", [range(1, 4), [0, 2, 4], range(5), [3]], ids=str)
def test_some_of_them(places):
    expected = [Digests(INPUTS)[place] for place in places]
    assert list(Digests(INPUTS).take(places)) == expected


@pytest.mark.parametrize("most", [0, INPUTS.nbytes])
def test_what_is_kept_holds_on_to_nothing(most):
    inputs = INPUTS.copy()
    kept = Digests(inputs).kept(most)
    expected = list(Digests(INPUTS))
    inputs[:] = 0
    assert list(kept) == expected
