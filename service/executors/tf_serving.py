"""Runs steps on TensorFlow Serving: any number of replicas, found by DNS, without importing TensorFlow.

``step`` is stateless there: the state goes out with the batch and comes back with the result. So a call that failed may
be made again on another replica, whatever became of it on the first.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence

import grpc

from service.errors import BadModelOutput, ExecutorUnavailable, ModelLoadError, ModelVersionUnavailable, ServiceError
from service.executors.serving_messages import MessageError
from service.executors.serving_replica import Replica, Unresponsive
from service.executors.serving_replicas import PollPolicy, ReplicaSet, parse_targets
from service.executors.step_messages import StepMessages
from service.types import ModelVersion, StepBatch, StepBatchResult, VersionKey, VersionStatus

_log = logging.getLogger(__name__)

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.005, 0.25

# What a call may be made again after, on another replica or on this one a little later.
_RETRIED = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.NOT_FOUND,  # rolled to another version, or restarted
        grpc.StatusCode.RESOURCE_EXHAUSTED,  # all its threads are at work
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.ABORTED,
    }
)
# What says that the graph could not run this batch.
_MODEL_FAILED = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DATA_LOSS,
    }
)


class TfServingExecutor:
    """Steps batches on one or more replicas of TensorFlow Serving, or of ``ntm-model-server``.

    Args:
        target: ``HOST:PORT``; ``dns:///HOST:PORT`` for all its addresses, each a replica; several, joined by commas.
        models: Names of the models to serve; TensorFlow Serving cannot be asked which it has.
        credentials: For TLS towards it.
        timeout: Seconds that a step may take, with all its retries.
        patience: Seconds of these that are spent waiting for a replica while none is there.
        start_timeout: Seconds that ``start`` waits for every model.
        poll_interval: Seconds between two questions to a replica for what it serves.
        probe_timeout: Seconds after which one that has not answered counts as unresponsive.
        resolve_interval: Seconds between two look-ups of a ``dns:///`` name.
        hold: Seconds that a version number which came to stand for another model is not listed.
        max_in_flight: Batches of one version under way at once.

    Raises:
        ValueError: ``target`` is not of these forms, or there is no model.
    """

    def __init__(
        self,
        target: str,
        *,
        models: Sequence[str],
        credentials: grpc.ChannelCredentials | None = None,
        timeout: float = 30.0,
        patience: float = 5.0,
        start_timeout: float = 60.0,
        poll_interval: float = 1.0,
        probe_timeout: float = 2.0,
        resolve_interval: float = 10.0,
        hold: float = 5.0,
        max_in_flight: int = 4,
    ) -> None:
        targets = parse_targets(target)
        if not models:
            raise ValueError("expected the name of at least one model: TensorFlow Serving cannot be asked for them")
        self._models = tuple(dict.fromkeys(models))
        self._timeout = timeout
        self._patience = patience
        self._start_timeout = start_timeout
        self._max_in_flight = max_in_flight
        policy = PollPolicy(interval=poll_interval, timeout=probe_timeout, resolve_interval=resolve_interval, hold=hold)
        self._replicas = ReplicaSet(targets, self._models, credentials=credentials, policy=policy)
        self._messages: dict[VersionKey, StepMessages] = {}
        self._turn = 0
        self._under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def max_in_flight(self) -> int:
        """Batches of one version worth having under way at once."""
        return self._max_in_flight

    @property
    def max_rows(self) -> int | None:
        """Any number: what it costs is the call."""
        return None

    async def start(self) -> None:
        """Finds the replicas; returns once every model has a version that can be stepped.

        Raises:
            ModelLoadError: not within ``start_timeout``.
        """
        deadline = asyncio.get_running_loop().time() + self._start_timeout
        await self._replicas.start()
        while missing := self._missing():
            remaining = deadline - asyncio.get_running_loop().time()
            if remaining <= 0:
                text = f"no version of {', '.join(missing)} can be stepped after {self._start_timeout:g} s"
                report = self._replicas.report()
                await self.close()
                raise ModelLoadError(f"{text}; {report}")
            await self._replicas.wait_changed(remaining)

    def versions(self) -> Mapping[VersionKey, ModelVersion]:
        """The versions that at least one replica serves; while one of them is away, also what it served last."""
        return self._replicas.versions()

    def newest(self, model: str) -> VersionKey | None:
        """The version for new sessions: the newest that every replica serves which is there at all.

        While a new version is rolled out, some replicas have it and others do not. Where no version is on all of
        them, it is the newest that any has.
        """
        return self._replicas.newest(model)

    def statuses(self) -> Mapping[VersionKey, VersionStatus]:
        """What the replicas say of each version, those that cannot be stepped among them."""
        return self._replicas.statuses()

    async def release(self, key: VersionKey) -> None:
        """Which versions are loaded is up to the model servers; what is known here of their messages can go."""
        self._messages.pop(key, None)

    def bucket(self, rows: int, steps: int) -> tuple[int, int]:
        """As they are: the exported ``step`` is a plain graph, which no shape is compiled for."""
        return rows, steps

    async def step(self, key: VersionKey, batch: StepBatch) -> StepBatchResult:
        """Runs one batch.

        Raises:
            ExecutorUnavailable: no replica could run it in time.
            ModelVersionUnavailable: no replica serves the version.
            BadModelOutput: the model failed on it, or answered with something else than its description says.
        """
        fingerprint = self._replicas.fingerprint(key)
        if fingerprint is None:
            raise ModelVersionUnavailable(f"no model server serves {key}", model=key.model, version=key.version)
        messages = self._messages.get(key) or self._messages.setdefault(key, StepMessages(key))
        self._under_way += 1
        self._idle.clear()
        try:
            return messages.result(await self._predict(key, fingerprint, messages.request(batch)), batch)
        except MessageError as error:
            raise BadModelOutput(f"the model server's answer for {key}: {error}") from error
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    async def close(self) -> None:
        """Waits for the steps under way and closes the channels."""
        await self._idle.wait()
        await self._replicas.close()

    async def _predict(self, key: VersionKey, fingerprint: str, request: bytes) -> bytes:
        """Tries the replicas that serve a version, one after the other, until one answers.

        The time limit is that of the calls, and of what is waited for between them: one timer more for each step, to
        watch over these, takes longer than to write the request.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._timeout
        alone_until: float | None = None
        tried: set[Replica] = set()
        pause = _FIRST_PAUSE_S
        problem = "none can be reached"
        while True:
            seconds = deadline - loop.time()
            if seconds <= 0:
                raise self._too_late(key)
            candidates = self._replicas.candidates(key, fingerprint)
            replica = self._pick(candidates, tried)
            if replica is None:
                alone_until = None if candidates else alone_until or loop.time() + self._patience
                if alone_until is not None:
                    self._check_worth_waiting(key, alone_until, problem)
                tried.clear()
                await self._replicas.wait_changed(min(pause, seconds))
                pause = min(2 * pause, _LONGEST_PAUSE_S)
                continue
            try:
                return await replica.predict(request, seconds=seconds, give_up=len(candidates) > 1)
            except Unresponsive as error:
                problem = str(error)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise self._too_late(key) from None
                problem = _why_again(key, error)
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    replica.doubt(key)
                elif error.code() is grpc.StatusCode.UNAVAILABLE:
                    replica.doubt()
            tried.add(replica)

    def _pick(self, candidates: Sequence[Replica], tried: set[Replica]) -> Replica | None:
        """The least busy one that has not been tried; round robin among equals."""
        if len(candidates) == 1 and not tried:  # nothing to choose
            return candidates[0]
        fresh = [replica for replica in candidates if replica not in tried]
        if not fresh:
            return None
        self._turn += 1
        shift = self._turn % len(fresh)
        return min(fresh[shift:] + fresh[:shift], key=lambda replica: replica.in_flight)

    def _too_late(self, key: VersionKey) -> ExecutorUnavailable:
        return ExecutorUnavailable(f"no model server answered for {key} within {self._timeout:g} s")

    def _check_worth_waiting(self, key: VersionKey, alone_until: float, problem: str) -> None:
        """Raises where no replica serves a version, and none is about to."""
        if self._replicas.settled():
            raise ModelVersionUnavailable(
                f"no model server serves {key} any more", model=key.model, version=key.version
            )
        if asyncio.get_running_loop().time() >= alone_until:
            raise ExecutorUnavailable(f"no model server is there for {key}: {problem}")

    def _missing(self) -> list[str]:
        there = {key.model for key in self._replicas.versions()}
        return [model for model in self._models if model not in there]


def _why_again(key: VersionKey, error: grpc.aio.AioRpcError) -> str:
    """Why a call that failed is worth another try.

    Raises:
        ServiceError: it is not: the graph failed on the batch, the time was up, or the model server refuses us.
    """
    code = error.code()
    if code in _RETRIED:
        return f"the last one answered {code.name}"
    _log.warning("step of %s failed with %s: %s", key, code.name, error.details())
    failure: ServiceError = ExecutorUnavailable(f"the model server answered {code.name} for {key}")
    if code in _MODEL_FAILED:
        failure = BadModelOutput(f"model {key} failed on this batch with {code.name}")
    raise failure from error
