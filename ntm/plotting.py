"""The paper's figure 6, from a trace."""

import numpy as np


def plot_trace(trace, index=0, *, head=0):
    """Draws one sequence: inputs and outputs, what was added and read, and where the heads wrote and read.

    Needs matplotlib, which is imported here and not with the package. No window is opened.

    Args:
        trace: as `ntm.trace` returned it.
        index: which sequence of the batch.
        head: which read head and write head.

    Returns:
        A ``matplotlib.figure.Figure``; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: there is no such sequence or head.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    _check("index", index, len(trace.inputs))
    _check("head", head, min(trace.read.weightings.shape[2], trace.write.weightings.shape[2]))
    panels = (
        (("Inputs", trace.inputs[index]), ("Outputs", trace.outputs[index])),
        (("Adds", trace.adds[index, :, head]), ("Reads", trace.read_vectors[index, :, head])),
        (
            ("Write weightings", trace.write.weightings[index, :, head]),
            ("Read weightings", trace.read.weightings[index, :, head]),
        ),
    )
    figure = Figure(figsize=(11, 9), layout="constrained")
    heights = [max(2.0, np.sqrt(row[0][1].shape[1])) for row in panels]
    for axes_row, row in zip(figure.subplots(3, 2, sharex=True, height_ratios=heights), panels, strict=True):
        for axes, (title, values) in zip(axes_row, row, strict=True):
            image = axes.imshow(values.T, aspect="auto", interpolation="nearest", cmap=_colours(title))
            axes.set_title(title)
            figure.colorbar(image, ax=axes, pad=0.01)
    for axes in figure.axes[:6]:
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("slot" if "weightings" in axes.get_title() else "channel")
    for axes in figure.axes[4:6]:
        axes.set_xlabel("time step")
    return figure


def _colours(title):
    return "gray" if "weightings" in title else "viridis"


def _check(name, value, size):
    if not 0 <= value < size:
        raise ValueError(f"{name} should be in 0..{size - 1}; received {value}")
