"""How long things of a kind take, of late."""

# The share of the last one.
_WEIGHT = 0.1


class MeanDuration:
    """A mean in which the last dozens count. Before there are so many, it is long.

    Args:
        longest: In seconds. What takes longer counts as this, so that one of them is soon forgotten.
    """

    __slots__ = ("_longest", "seconds")

    def __init__(self, longest: float) -> None:
        self._longest = longest
        self.seconds = longest

    def note(self, seconds: float) -> None:
        """One has taken so long."""
        self.seconds += _WEIGHT * (min(seconds, self._longest) - self.seconds)
