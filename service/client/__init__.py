"""The Python client of the gateway: NumPy in, NumPy out.

``SequenceClient`` blocks, ``AsyncSequenceClient`` is for asyncio. It needs grpcio, numpy and protobuf, not TensorFlow.
"""

from service.client.aio import AsyncSequenceClient, AsyncSession
from service.client.blocking import SequenceClient, Session
from service.client.errors import (
    FieldViolation,
    GatewayError,
    ModelNotFound,
    PositionMismatch,
    PrecedingStepFailed,
    SessionNotFound,
    StepConflict,
)
from service.client.futures import StepFuture
from service.client.retry import RetryPolicy
from service.client.values import Model, ModelVersion, SessionInfo, StateComponent

__all__ = [
    "SequenceClient",
    "Session",
    "AsyncSequenceClient",
    "AsyncSession",
    "StepFuture",
    "RetryPolicy",
    "GatewayError",
    "PositionMismatch",
    "StepConflict",
    "SessionNotFound",
    "ModelNotFound",
    "PrecedingStepFailed",
    "FieldViolation",
    "Model",
    "ModelVersion",
    "StateComponent",
    "SessionInfo",
]
