"""The batch of a chunk that runs by itself, made once and filled anew for each."""

from service.chunk import Chunk
from service.types import ModelVersion, StepBatch, empty_batch


class KeptBatch:
    """Keeps one batch of one row, for one chunk at a time.

    It may be filled again once nobody reads it any more: when its call has ended with a result, and whoever the chunk
    was for has copied what concerns it. After a call that failed or was given up its executor may read it still: that
    one is not given back, and another is made.

    Args:
        version: What it is a batch of.
    """

    def __init__(self, version: ModelVersion) -> None:
        self._version = version
        self._batch: StepBatch | None = None

    def take(self, item: Chunk, bucket: tuple[int, int]) -> StepBatch | None:
        """The batch of a chunk of which nothing has run yet, padded to ``(rows, steps)``.

        None where it has to be gathered: of another row count than one, or where its origin has to be told.
        """
        (rows, steps), states = bucket, item.states
        if rows != 1 or item.origin is not None or not isinstance(states, list):
            return None
        batch, self._batch = self._batch, None
        if batch is None or batch.inputs.shape[1] != steps:
            batch = empty_batch(1, steps, self._version.input_dim, self._version.state_size, again=True)
        inputs, lengths, reset, state, *_ = batch
        turn = item.turn
        if lengths[0] != turn:
            inputs[:, turn:] = 0
            lengths[0] = turn
        inputs[:, :turn] = item.inputs
        (before,) = states
        reset[0] = before is None
        state[0] = 0 if before is None else before
        return batch

    def give_back(self, batch: StepBatch | None) -> None:
        """Nobody reads a batch any more; what is none of these is let go of."""
        if batch is not None and batch.again:
            self._batch = batch
