"""``ntm-client bench``: how fast a gateway steps, seen from here."""

import time
from typing import Any

import numpy as np

from service.client.blocking import SequenceClient

_WARM_UP_ROUNDS = 3


def run(client: SequenceClient, model: str, *, sessions: int, time_steps: int, seconds: float) -> dict[str, Any]:
    """Steps many sessions together, closed loop: the next round starts when the last is answered.

    Args:
        client: Where to.
        model: The model's name.
        sessions: Stepped in each round, each by one chunk.
        time_steps: Of a chunk.
        seconds: For how long.

    Returns:
        Chunks and time steps each second, and the latency of a round in milliseconds.

    Raises:
        ValueError: a number is not positive.
    """
    if min(sessions, time_steps, seconds) <= 0:
        raise ValueError(f"expected positive numbers, got {sessions} sessions, {time_steps} time steps, {seconds} s")
    width = client.model(model).versions[0].input_dim
    rng = np.random.default_rng(0)
    opened = [client.create_session(model) for _ in range(sessions)]
    try:
        steps = [(session, rng.random((time_steps, width), np.float32)) for session in opened]
        for _ in range(_WARM_UP_ROUNDS):
            client.step_many(steps)
        rounds = []
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            began = time.perf_counter()
            client.step_many(steps)
            rounds.append(time.perf_counter() - began)
    finally:
        for session in opened:
            session.close()
    taken = np.array(rounds)
    chunks = sessions * len(taken) / taken.sum()
    p50, p90, p99 = 1e3 * np.percentile(taken, [50, 90, 99])
    return {
        "model": model,
        "sessions": sessions,
        "time_steps_a_chunk": time_steps,
        "rounds": len(taken),
        "chunks_per_s": round(chunks, 1),
        "time_steps_per_s": round(chunks * time_steps, 1),
        "round_p50_ms": round(p50, 3),
        "round_p90_ms": round(p90, 3),
        "round_p99_ms": round(p99, 3),
    }
