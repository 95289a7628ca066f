"""Sequences in and out of files: NumPy's .npy, CSV, and standard input and output."""

import sys
from pathlib import Path
from typing import TextIO

import numpy as np

from service.client.wire import FloatArray


class DataError(Exception):
    """A file cannot be used; the text says which, what was expected and what came."""


def read_sequence(name: str) -> FloatArray:
    """A sequence ``[time, features]`` from a .npy file, a CSV file, or (``-``) CSV on standard input.

    Raises:
        DataError: it is no such sequence.
        OSError: the file cannot be read.
    """
    if name == "-":
        return _read_csv(sys.stdin, "standard input")
    path = Path(name)
    if path.suffix != ".npy":
        with path.open(encoding="utf-8") as file:
            return _read_csv(file, name)
    try:
        # Never pickled objects: a file may come from anywhere.
        array = np.load(path, allow_pickle=False)
    except ValueError as error:
        raise DataError(f"{name}: expected an array saved by numpy.save; {error}") from None
    if array.ndim != 2 or not np.can_cast(array.dtype, np.float32, "same_kind"):
        raise DataError(f"{name}: expected numbers [time, features], got {array.dtype} {list(array.shape)}")
    sequence: FloatArray = array.astype(np.float32)
    return sequence


def write_sequence(array: FloatArray, name: str) -> None:
    """Writes ``[time, features]`` to a .npy file, a CSV file, or (``-``) as CSV to standard output."""
    if name == "-":
        _write_csv(array, sys.stdout)
    elif name.endswith(".npy"):
        np.save(name, array)
    else:
        with Path(name).open("w", encoding="utf-8") as file:
            _write_csv(array, file)


def _read_csv(file: TextIO, name: str) -> FloatArray:
    rows = [(number, line.strip()) for number, line in enumerate(file, 1) if line.strip()]
    values: list[list[float]] = []
    for number, line in rows:
        try:
            row = [float(cell) for cell in line.split(",")]
        except ValueError:
            raise DataError(f"{name}, line {number}: expected numbers separated by commas, got {line[:60]!r}") from None
        if values and len(row) != len(values[0]):
            raise DataError(f"{name}, line {number}: expected {len(values[0])} columns as above, got {len(row)}")
        values.append(row)
    if not values:
        raise DataError(f"{name} is empty; expected a line of numbers for each time step")
    return np.array(values, np.float32)


def _write_csv(array: FloatArray, file: TextIO) -> None:
    # Nine digits bring every float32 back exactly.
    np.savetxt(file, array, fmt="%.9g", delimiter=",")
