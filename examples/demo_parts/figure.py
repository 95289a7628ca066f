"""The picture: what the network did for one sequence, read live from the gateway while it was stepped."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from demo_parts.copying import CopySequence
from service.client import SequenceClient

Array = npt.NDArray[np.float32]

# Slots that no head ever looks at by more than this are left out of the picture.
_FAINT = 0.02


@dataclass(frozen=True, slots=True)
class Trace:
    """One sequence, step by step.

    Attributes:
        sequence: What went in.
        outputs: ``[time, bits]``.
        read: ``[time, slots]``: where the first read head looked.
        write: ``[time, slots]``: where the first write head wrote.
    """

    sequence: CopySequence
    outputs: Array
    read: Array
    write: Array


def trace_sequence(target: str, model: str, sequence: CopySequence) -> Trace:
    """Steps a sequence one time step at a time, and looks into the session after each."""
    outputs, states = [], []
    with SequenceClient(target) as client, client.session(model) as session:
        for step in sequence.inputs:
            outputs.append(session.step(step[None]))
            states.append(session.inspect())
    read, write = (np.stack([state[f"{head}_weightings"][0] for state in states]) for head in ("read", "write"))
    return Trace(sequence, np.concatenate(outputs), read, write)


def save_figure(trace: Trace, path: Path) -> None:
    """Draws a trace: input, target, output, write and read weightings over the same time steps."""
    slots = _used_slots(trace)
    time, bits = trace.outputs.shape
    target = np.full((time, bits), np.nan, np.float32)
    target[-trace.sequence.length :] = trace.sequence.target
    heights = [trace.sequence.inputs.shape[1], bits, bits, *2 * [min(max(0.8 * len(slots), 12), 18)]]
    figure = Figure(figsize=(9, 9.5), layout="constrained")
    axes = figure.subplots(5, 1, sharex=True, height_ratios=heights)
    signal = _rows(axes[0], trace.sequence.inputs.T, "input", "bit", "Greys")
    _rows(axes[1], target.T, "target (none before recall)", "bit", "Greys")
    _rows(axes[2], trace.outputs.T, "output", "bit", "Greys")
    focus = _rows(axes[3], trace.write[:, slots].T, "write weighting", "slot", "viridis")
    _rows(axes[4], trace.read[:, slots].T, "read weighting", "slot", "viridis")
    _label_flags(axes[0], bits)
    for axis in axes[3:]:
        _label_slots(axis, slots)
    recall = trace.sequence.length + 1.5
    for axis in axes:
        axis.axvline(recall, color="tab:red", linewidth=1, linestyle=(0, (3, 2)))
    axes[-1].set_xlabel("time step (dashed: recall begins)")
    figure.colorbar(signal, ax=axes[:3], label="value", shrink=0.8, aspect=25)
    figure.colorbar(focus, ax=axes[3:], label="weight", shrink=0.8, aspect=25)
    errors = int(np.sum((trace.outputs[-trace.sequence.length :] > 0.5) != (trace.sequence.target > 0.5)))
    figure.suptitle(
        f"A Neural Turing Machine copies {trace.sequence.length} x {bits} bits, {errors} wrong: "
        "state read live from the gateway"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)


def _rows(axis: Axes, values: Array, title: str, label: str, colours: str) -> AxesImage:
    colour_map = mpl.colormaps[colours].with_extremes(bad="#e8eef4")
    image = axis.imshow(values, aspect="auto", interpolation="nearest", cmap=colour_map, vmin=0, vmax=1)
    axis.set_title(title, loc="left", fontsize=10, pad=3)
    axis.set_ylabel(label)
    axis.set_yticks([])
    return image


def _label_flags(axis: Axes, bits: int) -> None:
    axis.set_yticks([(bits - 1) / 2, bits, bits + 1], ["bits", "start", "end"], fontsize=7)
    axis.set_ylabel("")


def _label_slots(axis: Axes, slots: npt.NDArray[np.int64]) -> None:
    every = max(1, len(slots) // 6)
    shown = range(0, len(slots), every)
    axis.set_yticks(list(shown), [str(slots[row]) for row in shown], fontsize=7)


def _used_slots(trace: Trace) -> npt.NDArray[np.int64]:
    """The slots from the first to the last that a head looked at, going round the end of the memory if need be."""
    used = np.flatnonzero((np.maximum(trace.read, trace.write) > _FAINT).any(axis=0))
    slots = trace.read.shape[1]
    if len(used) == 0:
        return np.arange(slots)
    gaps = np.diff(np.append(used, used[0] + slots))
    first = used[(int(gaps.argmax()) + 1) % len(used)]
    length = min(slots, slots - int(gaps.max()) + 3)
    return (first - 1 + np.arange(length)) % slots
