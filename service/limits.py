"""What a request may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a request may ask for. Bytes and seconds.

    Attributes:
        max_chunk_bytes: The largest inputs of one step.
        max_stream_steps: Steps under way in one stream past which it is not read.
        step_timeout: Time limit of a step that has none.
        session_ttl: TTL of a session that asks for none.
        max_session_ttl: The longest TTL.
    """

    max_chunk_bytes: int
    max_stream_steps: int
    step_timeout: float
    session_ttl: float
    max_session_ttl: float
