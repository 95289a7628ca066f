"""The table that a trained network is judged by."""

from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table, over fresh sequences of one size.

    Attributes:
        size: of the sequences, as the task counts it.
        sequences: how many.
        asked_bits: bits asked for in a sequence, in the mean.
        wrong_bits: of them wrong, in the mean.
        median_wrong_bits: the same in the median.
        loss_bits: loss of a sequence in bits, in the mean.
        exact: share of the sequences without a wrong bit.
        optimal_bits: the loss of the task's optimal predictor on the same sequences, where it has one.
    """

    size: tuple[int, ...]
    sequences: int
    asked_bits: float
    wrong_bits: float
    median_wrong_bits: float
    loss_bits: float
    exact: float
    optimal_bits: float | None = None
