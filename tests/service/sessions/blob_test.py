import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from service.errors import CorruptState, StoreUnavailable
from service.sessions import LastStep, blob
from service.types import StepReply

floats = st.floats(width=32, allow_nan=False)
positions = st.integers(min_value=0, max_value=2**63 - 1)
states = st.none() | arrays.arrays(np.float32, st.integers(0, 40), elements=floats)
outputs = arrays.arrays(np.float32, st.tuples(st.integers(0, 5), st.integers(0, 4)), elements=floats)


@st.composite
def contents(draw):
    position, last = draw(positions), None
    if draw(st.booleans()):
        digest = draw(st.binary(min_size=32, max_size=32))
        last = LastStep(draw(positions), digest, StepReply(position, draw(outputs)))
    return blob.Content(position, draw(st.binary(min_size=16, max_size=16)), draw(states), last)


def content():
    last = LastStep(3, bytes(range(32)), StepReply(5, np.arange(6, dtype=np.float32).reshape(2, 3)))
    return blob.Content(5, b"0123456789abcdef", np.linspace(-1, 1, 4, dtype=np.float32), last)


# content() as both forms have been written since the first release: what is stored must stay readable.
STORED = {
    1: (
        "4e530103252f10c83610ebca1a059c0bae8255eb05000000000000000300000000000000000102030405060708090a0b"
        "0c0d0e0f101112131415161718191a1b1c1d1e1f30313233343536373839616263646566040000000200000003000000"
        "000080bfabaaaabeabaaaa3e0000803f000000000000803f0000004000004040000080400000a040b7b992a0"
    ),
    2: (
        "4e530203252f10c83610ebca1a059c0bae8255eb05000000000000000300000000000000000102030405060708090a0b"
        "0c0d0e0f101112131415161718191a1b1c1d1e1f30313233343536373839616263646566040000000200000003000000"
        "000080bfabaaaabeabaaaa3e0000803f000000000000803f0000004000004040000080400000a040c1f92f83d9d74f49"
        "abfeffbd2adfd5e8"
    ),
}


@pytest.mark.parametrize("form", blob.FORMS)
def test_a_form_does_not_change(form):
    stored = bytes.fromhex(STORED[form])
    assert blob.encode(content(), form=form, fingerprint="f", binding=b"b") == stored
    found = blob.decode(stored, fingerprint="f", binding=b"b")
    assert (found.position, found.token) == (content().position, content().token)
    _same_array(found.state, content().state)


@pytest.mark.parametrize("form", blob.FORMS)
@given(content=contents())
def test_what_is_packed_comes_out(form, content):
    packed = blob.encode(content, form=form, fingerprint="f", binding=b"b")
    found = blob.decode(packed, fingerprint="f", binding=b"b")
    assert (found.position, found.token) == (content.position, content.token)
    _same_array(found.state, content.state)
    assert (found.last is None) == (content.last is None)
    if content.last:
        assert found.last[:2] == content.last[:2]
        assert found.last.reply.position == content.position
        _same_array(found.last.reply.outputs, content.last.reply.outputs)


@pytest.mark.parametrize("form", blob.FORMS)
def test_any_flipped_byte_is_found_out(form):
    packed = blob.encode(content(), form=form, fingerprint="f", binding=b"b")
    for place in range(len(packed)):
        for flip in (0x01, 0x80, 0xFF):
            broken = bytearray(packed)
            broken[place] ^= flip
            with pytest.raises((CorruptState, StoreUnavailable)) as caught:
                blob.decode(bytes(broken), fingerprint="f", binding=b"b")
            assert caught.type is CorruptState or place == 2, "only the form itself can look like a newer one"


@pytest.mark.parametrize("form", blob.FORMS)
def test_any_cut_is_found_out(form):
    packed = blob.encode(content(), form=form, fingerprint="f", binding=b"b")
    for length in range(len(packed)):
        with pytest.raises(CorruptState):
            blob.decode(packed[:length], fingerprint="f", binding=b"b")
    with pytest.raises(CorruptState):
        blob.decode(packed + b"\0", fingerprint="f", binding=b"b")


@pytest.mark.parametrize("form", blob.FORMS)
@pytest.mark.parametrize(("fingerprint", "binding"), [("f", b"another"), ("another", b"b")])
def test_a_blob_of_something_else_is_found_out(form, fingerprint, binding):
    packed = blob.encode(content(), form=form, fingerprint="f", binding=b"b")
    with pytest.raises(CorruptState):
        blob.decode(packed, fingerprint=fingerprint, binding=binding)


def test_a_form_of_a_later_release_is_not_called_corrupt():
    packed = bytearray(blob.encode(content(), form=2, fingerprint="f", binding=b"b"))
    packed[2] = 3
    with pytest.raises(StoreUnavailable, match="form 3"):
        blob.decode(bytes(packed), fingerprint="f", binding=b"b")


def _same_array(one, two):
    assert (one is None) == (two is None)
    if one is not None:
        assert one.shape == two.shape
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, two)
