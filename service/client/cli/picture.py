"""``ntm-client inspect --picture``: a session's state, drawn."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from service.client.cli.data import DataError
from service.client.wire import FloatArray

_TALLEST = 40  # rows of a component; with more than that it is drawn on its side


def save(state: Mapping[str, FloatArray], axes_of: Mapping[str, tuple[str, ...]], title: str, path: Path) -> None:
    """Draws each component of a state as a map of its values.

    Args:
        state: The components by name.
        axes_of: What the axes of each count; may be empty.
        title: Of the picture.
        path: Where it goes.

    Raises:
        DataError: matplotlib is not installed, or does not know the file's kind.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise DataError("--picture needs matplotlib: pip install matplotlib")
    from matplotlib.figure import Figure

    maps = {name: _flat(value, axes_of.get(name, ())) for name, value in state.items()}
    heights = [max(len(values), 3) + 4 for values, _ in maps.values()]
    figure = Figure(figsize=(9, 0.6 + 0.11 * sum(heights) + 0.5 * len(maps)), layout="constrained")
    all_axes = figure.subplots(len(maps), 1, height_ratios=heights, squeeze=False)[:, 0]
    for axes, (name, (values, labels)) in zip(all_axes, maps.items(), strict=True):
        _draw(figure, axes, f"{name}  {' x '.join(map(str, state[name].shape))}", values, labels)
    figure.suptitle(title)
    try:
        figure.savefig(path, dpi=160)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None


def _flat(value: FloatArray, labels: tuple[str, ...]) -> tuple[FloatArray, tuple[str, str]]:
    """A component as a matrix that is not taller than it is wide, and what its rows and its columns are."""
    matrix = value.reshape(-1, value.shape[-1]) if value.ndim > 1 else value.reshape(1, -1)
    rows, columns = ", ".join(labels[:-1]), "".join(labels[-1:])
    return (matrix.T, (columns, rows)) if len(matrix) > max(_TALLEST, matrix.shape[1]) else (matrix, (rows, columns))


def _draw(figure: Any, axes: Any, title: str, values: FloatArray, labels: tuple[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    # Weightings are at least zero everywhere; what has both signs gets a scale with white in the middle.
    low, high = float(values.min()), float(values.max())
    bound = max(abs(low), abs(high)) or 1.0
    scale = (
        {"cmap": "viridis", "vmin": 0, "vmax": bound} if low >= 0 else {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound}
    )
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **scale)
    axes.set_title(title, loc="left", fontsize=9)
    axes.tick_params(labelsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_yticks(np.arange(0, len(values), max(1, len(values) // 5)))
    axes.set_ylabel(labels[0], fontsize=8)
    axes.set_xlabel(labels[1], fontsize=8)
    figure.colorbar(image, ax=axes, aspect=8).ax.tick_params(labelsize=7)
