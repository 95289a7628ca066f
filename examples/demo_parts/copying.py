"""Copy sequences, stepped through a gateway in random chunks, many at once; and what came of it."""

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from service.client import AsyncSequenceClient, AsyncSession

Array = npt.NDArray[np.float32]

LONGEST_CHUNK = 12


@dataclass(frozen=True, slots=True)
class CopySequence:
    """One sequence of the copy task.

    Attributes:
        inputs: ``[2 * length + 2, bits + 2]``: the start flag, the pattern, the end flag, and silence while it is
            recalled.
        target: ``[length, bits]``: the pattern.
    """

    inputs: Array
    target: Array

    @property
    def length(self) -> int:
        """Time steps of the pattern."""
        return len(self.target)


@dataclass(slots=True)
class Run:
    """A sequence that was stepped.

    Attributes:
        sequence: What went in.
        outputs: ``[time, bits]``: what came out.
        latencies: Seconds from asking for a chunk to its answer, for each chunk.
        seconds: From its first chunk to its last answer.
    """

    sequence: CopySequence
    outputs: Array
    latencies: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def recalled(self) -> Array:
        """``[length, bits]``: the outputs of the second half, where the pattern is asked for."""
        return self.outputs[-self.sequence.length :]

    @property
    def bit_errors(self) -> int:
        """Bits that were recalled wrongly: the outputs are probabilities, cut at one half."""
        return int(np.sum((self.recalled > 0.5) != (self.sequence.target > 0.5)))


def make_sequence(length: int, bits: int, rng: np.random.Generator) -> CopySequence:
    """A random pattern of ``length`` time steps, with its flags."""
    target = rng.integers(0, 2, (length, bits)).astype(np.float32)
    inputs = np.zeros((2 * length + 2, bits + 2), np.float32)
    inputs[0, bits] = 1
    inputs[1 : length + 1, :bits] = target
    inputs[length + 1, bits + 1] = 1
    return CopySequence(inputs, target)


def chunks(inputs: Array, rng: np.random.Generator) -> Iterator[Array]:
    """The inputs in chunks of random lengths."""
    begin = 0
    while begin < len(inputs):
        end = begin + int(rng.integers(1, LONGEST_CHUNK + 1))
        yield inputs[begin:end]
        begin = end


async def step_all(
    target: str,
    model: str,
    sequences: Sequence[CopySequence],
    sessions: int,
    rng: np.random.Generator,
    progress: Callable[[int], None],
) -> list[Run]:
    """Steps all the sequences, ``sessions`` of them at a time, each in a session of its own.

    Args:
        target: The gateway.
        model: The model's name.
        sequences: What to step; taken in this order.
        sessions: How many sessions are open at once.
        rng: Draws the chunks.
        progress: Told the number of time steps after each chunk.
    """
    left = iter(enumerate(sequences))
    runs: dict[int, Run] = {}

    async def work(client: AsyncSequenceClient, rng: np.random.Generator) -> None:
        for number, sequence in left:
            async with client.session(model) as session:
                runs[number] = await _step_one(session, sequence, rng, progress)

    async with AsyncSequenceClient(target) as client:
        await asyncio.gather(*(work(client, stream) for stream in rng.spawn(sessions)))
    return [runs[number] for number in range(len(sequences))]


async def _step_one(
    session: AsyncSession, sequence: CopySequence, rng: np.random.Generator, progress: Callable[[int], None]
) -> Run:
    outputs, latencies = [], []
    began = time.perf_counter()
    for chunk in chunks(sequence.inputs, rng):
        asked = time.perf_counter()
        outputs.append(await session.step(chunk))
        latencies.append(time.perf_counter() - asked)
        progress(len(chunk))
    return Run(sequence, np.concatenate(outputs), latencies, time.perf_counter() - began)
