"""The pictures of a run."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import matplotlib as mpl
import numpy as np
import numpy.typing as npt

from training.results import Row
from training.tasks import Batch

mpl.use("Agg")
from matplotlib import pyplot as plt

# Runs that are so much longer than others would squeeze them into the edge of the picture.
_MUCH_LONGER = 5
# What lies within one is told apart as well, and labelled more plainly, without a logarithm.
_DECADE = 10


def learning_curves(run_dirs: Sequence[Path], path: Path) -> None:
    """Loss in bits a sequence over the sequences trained on, one line for each run; networks given up are pale."""
    ends: list[int] = []
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for number, run_dir in enumerate(run_dirs):
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        ends.extend(line["sequences"] for line in lines[-1:])
        attempts = sorted({line["attempt"] for line in lines})
        for attempt in attempts:
            part = [line for line in lines if line["attempt"] == attempt and line["bits_per_sequence"] is not None]
            sequences, loss = ([line[key] for line in part] for key in ("sequences", "bits_per_sequence"))
            last = attempt == attempts[-1]
            style = {"label": run_dir.name, "alpha": 1.0} if last else {"alpha": 0.35}
            axes.plot(sequences, loss, color=f"C{number}", linewidth=1.4, **style)
    axes.set(xlabel="sequences trained on", ylabel="loss, bits a sequence", title="Learning curves")
    lowest, highest = axes.dataLim.intervaly
    if highest > _DECADE * lowest:
        axes.set(yscale="log")
    if ends and max(ends) > _MUCH_LONGER * min(ends):
        axes.set(xscale="log")
    axes.legend()
    _save(figure, path)


def generalisation(tables: dict[str, Sequence[Row]], path: Path) -> None:
    """Share of the asked-for bits that are wrong, over the sizes; one line for each named table.

    Where the task has an optimal predictor, which is wrong as well, the loss above that predictor's instead.
    """
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for name, rows in tables.items():
        axes.plot(["x".join(map(str, row.size)) for row in rows], [_fault(row) for row in rows], marker="o", label=name)
    if any(row.optimal_bits is not None for rows in tables.values() for row in rows):
        axes.axhline(1.0, color="grey", linewidth=0.8, linestyle="--")
        axes.set(ylabel="loss above the optimal predictor's, %")
    else:
        axes.set(ylabel="wrong bits, %", ylim=(-2, 60))
    axes.set(xlabel="size of the sequence", title="Sizes inside and past the trained range")
    axes.legend()
    _save(figure, path)


def _fault(row: Row) -> float:
    """In percent: the wrong bits among those asked for, or the loss above the optimal predictor's."""
    if row.optimal_bits is None:
        return 100 * row.wrong_bits / row.asked_bits
    return 100 * (row.loss_bits / row.optimal_bits - 1)


def memory_use(model: keras.Sequential, batch: Batch, path: Path) -> None:
    """Input, output, target, and where the heads of an NTM stood, for the first sequence of a batch.

    Raises:
        ValueError: the model has no layer named "ntm".
    """
    if "ntm" not in {layer.name for layer in model.layers}:
        raise ValueError("the picture of the memory needs a model with a layer named 'ntm'")
    weightings = head_weightings(model.get_layer("ntm"), batch.inputs[:1])
    outputs = keras.ops.convert_to_numpy(model(batch.inputs[:1]))[0] * batch.mask[0][:, None]
    panels: dict[str, Any] = {
        "input": batch.inputs[0],
        "target": batch.targets[0],
        "output": outputs,
        "write weighting": weightings["write_weightings"],
        "read weighting": weightings["read_weightings"],
    }
    heights = [min(4.0, max(1.0, values.shape[1] / 16)) for values in panels.values()]
    figure, grid = plt.subplots(
        len(panels), 1, figsize=(9, 10), height_ratios=heights, sharex=True, layout="constrained"
    )
    for axes, (title, values) in zip(grid, panels.items(), strict=True):
        # A priority may be negative: that is red.
        shades = {"cmap": "RdGy", "vmin": -1} if values.min() < 0 else {"cmap": "Greys", "vmin": 0}
        axes.imshow(values.T, aspect="auto", vmax=1, interpolation="nearest", **shades)
        axes.set_ylabel("slot" if "weighting" in title else "channel" if title == "input" else "bit")
        axes.set_title(title, loc="left", fontsize=9)
        if values.shape[1] == 1:
            axes.set_yticks([0])
    grid[-1].set_xlabel("time step")
    _save(figure, path)


def head_weightings(layer: Any, inputs: npt.NDArray[np.float32]) -> dict[str, npt.NDArray[np.float32]]:
    """Where the first read and the first write head stood at each step.

    Args:
        layer: a `NeuralTuringMachine`.
        inputs: ``[1, time, input_dim]``.

    Returns:
        From the names "read_weightings" and "write_weightings" to ``[time, slots]``.
    """
    names = [component.name for component in layer.cell.state_layout]
    wanted = {name: names.index(name) for name in ("read_weightings", "write_weightings")}
    states, seen = layer.get_initial_state(len(inputs)), []
    for step in range(inputs.shape[1]):
        _, states = layer.cell(inputs[:, step], states)
        seen.append(states)
    slots = layer.cell.n_slots
    return {
        name: np.stack([keras.ops.convert_to_numpy(states[index])[0, :slots] for states in seen])
        for name, index in wanted.items()
    }


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
