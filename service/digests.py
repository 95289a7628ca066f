"""Digests of steps' inputs: what makes a repeated step the same step."""

import functools
import hashlib
from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt


def digest_of(content: bytes, time: int, width: int) -> bytes:
    """SHA-256 over dtype, shape and bytes of inputs ``[time, width]``."""
    digest = _begun(time, width).copy()
    digest.update(content)
    return digest.digest()


@functools.lru_cache(maxsize=64)
def _begun(time: int, width: int) -> "hashlib._Hash":
    """Of dtype and shape: OpenSSL takes longer to find the algorithm by its name than to use it on a single step."""
    return hashlib.sha256(b"f4:%d:%d:" % (time, width))


class Digests(Sequence[bytes]):
    """Those of many steps, each found when it is asked for: few of them ever are.

    Args:
        inputs: ``[steps, time, width]``, little-endian float32; not copied.
    """

    __slots__ = ("_inputs",)

    def __init__(self, inputs: npt.NDArray[np.float32]) -> None:
        self._inputs = inputs

    def __len__(self) -> int:
        return len(self._inputs)

    @overload
    def __getitem__(self, at: int) -> bytes: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[bytes]: ...
    def __getitem__(self, at: int | slice) -> bytes | Sequence[bytes]:
        if isinstance(at, slice):
            return Digests(self._inputs[at])
        _, time, width = self._inputs.shape
        return digest_of(self._inputs[at].tobytes(), time, width)

    def take(self, places: Sequence[int]) -> "Digests":
        """Those of some of the steps; a range is one of places that follow each other."""
        if len(places) == len(self):
            return self
        return Digests(self._inputs[places.start : places.stop] if isinstance(places, range) else self._inputs[places])

    def kept(self, most: int) -> Sequence[bytes]:
        """The same for long: of a copy of the inputs where that has at most so many bytes, else found now."""
        return Digests(self._inputs.copy()) if self._inputs.nbytes <= most else list(self)
