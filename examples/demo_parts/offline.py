"""The same sequences whole, through the exported model itself: what stepping has to agree with."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]


@contextmanager
def _native_errors_to(log: Path) -> Iterator[None]:
    """What TensorFlow's C++ prints as it starts goes to a file; Python's own errors are shown as ever."""
    sys.stderr.flush()
    kept = os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def run_whole(model_path: Path, sequences: list[Array], log: Path) -> tuple[list[Array], float]:
    """Runs ``serving_default`` on whole sequences, in one padded batch.

    Args:
        model_path: A version directory.
        sequences: Each ``[time, input_dim]``.
        log: Takes what TensorFlow says as it starts.

    Returns:
        The outputs, each ``[time, output_dim]``, and the tolerance to compare with: 1e-5, or ten times what the model
        itself differs by between this batch and a batch of one, whichever is larger.
    """
    longest = max(map(len, sequences))
    batch = np.stack([np.pad(x, ((0, longest - len(x)), (0, 0))) for x in sequences])
    with _native_errors_to(log):
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # as the gateway has it (docs/design.md, "oneDNN is off")
        import tensorflow as tf  # seconds and hundreds of MB, for this one comparison

        run = tf.saved_model.load(str(model_path)).signatures["serving_default"]
        together = run(inputs=tf.constant(batch))["outputs"].numpy()
        alone = np.concatenate([run(inputs=tf.constant(row[None]))["outputs"].numpy() for row in batch[:4]])
    tolerance = max(1e-5, 10 * float(np.abs(alone - together[:4]).max()))
    return [together[row, : len(x)] for row, x in enumerate(sequences)], tolerance
