"""When to try again, and how long to wait before."""

import random
from dataclasses import dataclass

import grpc

from service.client.errors import GatewayError

# A stream ends so when a gateway is killed, and also when something is wrong for good: it is tried a few times only.
_SUSPECT = frozenset({grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED})


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """Exponential backoff with jitter. Retries end with the deadline of what is retried.

    Attributes:
        initial: Seconds before the first retry.
        multiplier: How much longer each wait is than the one before.
        maximum: The longest wait, in seconds; a gateway that asks for a longer one (``RetryInfo``) gets it.
        breaks: How many times in a row a stream may break in a way that a restart does not explain (INTERNAL, UNKNOWN,
            CANCELLED) before its steps fail.
    """

    initial: float = 0.05
    multiplier: float = 2.0
    maximum: float = 2.0
    breaks: int = 5

    def __post_init__(self) -> None:
        if not (0 < self.initial <= self.maximum and self.multiplier >= 1 and self.breaks >= 0):
            raise ValueError(f"expected 0 < initial <= maximum, multiplier >= 1 and breaks >= 0; got {self}")

    def delay(self, attempt: int, error: GatewayError) -> float:
        """Seconds to wait after the ``attempt``-th failure, counted from 1.

        Half of it is random, so that clients who lost the same gateway do not all come back at once.
        """
        # The exponent is bounded: past some thirty doublings every policy is at its maximum.
        backoff = min(self.maximum, self.initial * self.multiplier ** min(attempt - 1, 30))
        return max(backoff * random.uniform(0.5, 1.0), error.retry_after or 0.0)


def repeats_call(error: GatewayError) -> bool:
    """Whether a unary call is worth repeating: all of ours are idempotent."""
    return error.code() is grpc.StatusCode.UNAVAILABLE


def repeats_step(error: GatewayError) -> bool:
    """Whether a step that was answered so is worth repeating: it was not applied, or a repeat will find that it was."""
    overloaded = error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and error.retry_after is not None
    return error.code() is grpc.StatusCode.UNAVAILABLE or overloaded


def repeats_stream(error: GatewayError, breaks: int, policy: RetryPolicy) -> bool:
    """Whether the steps of a stream that broke so, ``breaks`` times in a row by now, are worth sending on another."""
    return repeats_step(error) or (error.code() in _SUSPECT and breaks <= policy.breaks)
