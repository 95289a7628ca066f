"""What a model answered, looked at before anybody is told of it."""

import numpy as np

from service.errors import BadModelOutput
from service.types import BoolArray, ModelVersion, StepBatch, StepBatchResult, all_finite


def check_shapes(version: ModelVersion, batch: StepBatch, result: StepBatchResult) -> None:
    """Compares the shapes of an answer with those of its batch.

    Raises:
        BadModelOutput: they are not what the contract says.
    """
    rows, steps, _ = batch.inputs.shape
    expected = ((rows, steps, version.output_dim), (rows, version.state_size))
    came = (result.outputs.shape, result.state.shape)
    if came != expected:
        raise BadModelOutput(
            f"model {version.key} answered outputs {came[0]} and state {came[1]}; "
            f"expected {expected[0]} and {expected[1]}"
        )


def bad_rows(result: StepBatchResult, rows: int) -> BoolArray | None:
    """Which of the first ``rows`` rows hold NaN or Inf; None where none does."""
    outputs, state = result.outputs, result.state
    if rows < len(state):
        outputs, state = outputs[:rows], state[:rows]
    if all_finite(outputs, state):
        return None
    bad = np.zeros(rows, np.bool_)
    for row in range(rows):
        bad[row] = not (np.isfinite(result.outputs[row]).all() and np.isfinite(result.state[row]).all())
    return bad
