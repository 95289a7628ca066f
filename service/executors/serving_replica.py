"""One replica of a model server: its channel, and what it is known to serve."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple

import grpc

from service.executors.description import DescriptionError, parse_description
from service.executors.serving_messages import MessageError, decode_predict, encode_predict, string_output
from service.executors.serving_protos import get_model_status_pb2
from service.types import ModelVersion, VersionKey, VersionState, VersionStatus

_log = logging.getLogger(__name__)

_PREDICT = "/tensorflow.serving.PredictionService/Predict"
_GET_MODEL_STATUS = "/tensorflow.serving.ModelService/GetModelStatus"
_AVAILABLE = 30
_STATES = {10: VersionState.LOADING, 20: VersionState.LOADING, 40: VersionState.DRAINING, 50: VersionState.FAILED}
# Codes that say something of the model or the version, not of the replica.
_ABOUT_THE_MODEL = frozenset(
    {
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.OUT_OF_RANGE,
        grpc.StatusCode.UNKNOWN,
    }
)


class Endpoint(NamedTuple):
    """Where a replica is: what the channel is opened to, and the name that its certificate must have."""

    target: str
    server_name: str | None = None


class Replica:
    """Asks one replica again and again what it serves, and runs predictions on it.

    What is known of a replica holds for one connection: when that ends, another process, with other models under the
    same numbers, may answer on the next. So every connection has a number, and versions are described anew on each.

    Args:
        endpoint: Where it is.
        models: The names of the models to ask for.
        credentials: For TLS towards it; None for none.
        interval: Seconds between two questions.
        timeout: Seconds that an answer may take before the replica counts as unresponsive.
        changed: Called after every change of what is known.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        models: Sequence[str],
        *,
        credentials: grpc.ChannelCredentials | None,
        interval: float,
        timeout: float,
        changed: Callable[[], None],
    ) -> None:
        self.endpoint = endpoint
        self.in_flight = 0
        self.known = False
        self.responsive = True
        self.versions: dict[VersionKey, ModelVersion] = {}
        self.statuses: dict[VersionKey, VersionStatus] = {}
        self.problems: dict[str, str] = {}
        self.connection = 0
        self._models = models
        self._interval = interval
        self._timeout = timeout
        self._changed = changed
        self._ask_now = asyncio.Event()
        self._unresponsive: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel = _open(endpoint, credentials)
        self._predict: Callable[..., Awaitable[bytes]] = self._channel.unary_unary(_PREDICT)
        self._status = self._channel.unary_unary(
            _GET_MODEL_STATUS,
            request_serializer=get_model_status_pb2.GetModelStatusRequest.SerializeToString,
            response_deserializer=get_model_status_pb2.GetModelStatusResponse.FromString,
        )
        self._tasks = [
            asyncio.create_task(self._ask_for_ever(), name=f"replica {endpoint.target}"),
            asyncio.create_task(self._watch_connection(), name=f"connection {endpoint.target}"),
        ]

    async def predict(self, request: bytes, *, seconds: float, give_up: bool) -> bytes:
        """Runs a prediction; returns a serialized ``PredictResponse``.

        Args:
            request: A serialized ``PredictRequest``.
            seconds: Until the call is given up; the model server is told, and stops running it then.
            give_up: Stop waiting as soon as the replica counts as unresponsive: another one can take over.

        Raises:
            grpc.aio.AioRpcError: it failed.
            Unresponsive: the replica stopped answering, or its connection ended and began again meanwhile.
        """
        connection = self.connection
        self.in_flight += 1
        try:
            call = self._predict(request, timeout=seconds)
            response = await (self._unless_unresponsive(call) if give_up else call)
        finally:
            self.in_flight -= 1
        if self.connection != connection:
            raise Unresponsive(f"{self.endpoint.target} was connected to anew while it ran")
        return response

    async def _unless_unresponsive(self, call: Awaitable[bytes]) -> bytes:
        task = asyncio.ensure_future(call)
        try:
            waited: list[asyncio.Future[Any]] = [task, self._unresponsive]
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise Unresponsive(f"{self.endpoint.target} stopped answering")
            return await task
        finally:
            task.cancel()

    def doubt(self, key: VersionKey | None = None) -> None:
        """Forgets a version, or all of them, and asks again at once; until then nothing is ``known`` for sure."""
        self.known = False
        if key is None:
            self.versions = {}
        else:
            self.versions = {known: version for known, version in self.versions.items() if known != key}
        self._ask_now.set()
        self._changed()

    async def close(self) -> None:
        """Lets go of the channel; calls under way fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._channel.close()

    async def _watch_connection(self) -> None:
        """Numbers the connections: each time one that was ready is not, all that is known is worth nothing."""
        state = self._channel.get_state(try_to_connect=True)
        while True:
            await self._channel.wait_for_state_change(state)
            if state is grpc.ChannelConnectivity.READY:
                self.connection += 1
                self.doubt()
            elif self._channel.get_state() is grpc.ChannelConnectivity.READY:
                self._ask_now.set()
            state = self._channel.get_state(try_to_connect=True)

    async def _ask_for_ever(self) -> None:
        while True:
            self._ask_now.clear()
            await self._ask()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._interval):
                    await self._ask_now.wait()

    async def _ask(self) -> None:
        """Asks which versions are available, and describes those that are new."""
        connection = self.connection
        problems: dict[str, str] = {}
        found: dict[VersionKey, ModelVersion] = {}
        statuses: dict[VersionKey, VersionStatus] = {}
        try:
            for model in self._models:
                for key in await self._available(model, statuses, problems):
                    version = self.versions.get(key) or await self._describe(key, problems)
                    if version is not None:
                        found[key] = version
                    else:
                        statuses[key] = VersionStatus(VersionState.FAILED, problems[str(key)])
        except grpc.aio.AioRpcError as error:
            self._failed(error)
            return
        if self.connection == connection:
            self.statuses = statuses
            self._found(found, problems)

    def _found(self, found: dict[VersionKey, ModelVersion], problems: dict[str, str]) -> None:
        for what, problem in problems.items():
            if self.problems.get(what) != problem:
                _log.warning("model server %s: %s: %s", self.endpoint.target, what, problem)
        changed = not self.known or not self.responsive or found != self.versions
        self.known = True
        self.versions, self.problems = found, problems
        if not self.responsive:
            self.responsive = True
            self._unresponsive = asyncio.get_running_loop().create_future()
        if changed:
            self._changed()

    def _failed(self, error: grpc.aio.AioRpcError) -> None:
        code = error.code()
        if self.problems.get("") != code.name:
            _log.warning("model server %s: %s: %s", self.endpoint.target, code.name, error.details())
        self.problems = {"": code.name}
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            return  # all its threads are at work: it is busy, not gone
        if code is grpc.StatusCode.UNAVAILABLE:
            self.known, self.versions = False, {}
        elif self.responsive:
            self.responsive = False
            self._unresponsive.set_result(None)
        self._changed()

    async def _available(
        self, model: str, statuses: dict[VersionKey, VersionStatus], problems: dict[str, str]
    ) -> list[VersionKey]:
        """The versions that can be stepped; of the others ``statuses`` tells."""
        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = model
        try:
            response = await self._status(request, timeout=self._timeout)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
            problems[model] = "not served"
            return []
        states = {status.version: status.state for status in response.model_version_status}
        for status in response.model_version_status:
            text = status.status.error_message
            # An END without an error is a version that was unloaded: it is not there any more.
            if (state := _STATES.get(status.state)) is not None and (text or state is not VersionState.FAILED):
                statuses[VersionKey(model, status.version)] = VersionStatus(state, text)
        available = [VersionKey(model, version) for version, state in states.items() if state == _AVAILABLE]
        if not available:
            problems[model] = f"no version is available; states: {states}"
        return available

    async def _describe(self, key: VersionKey, problems: dict[str, str]) -> ModelVersion | None:
        try:
            response = await self._predict(encode_predict(key, "describe", {}), timeout=self._timeout)
            return parse_description(key, string_output(decode_predict(response), "config"))
        except grpc.aio.AioRpcError as error:
            if error.code() not in _ABOUT_THE_MODEL:
                raise
            problems[str(key)] = f"its describe signature failed with {error.code().name}"
        except (MessageError, DescriptionError) as error:
            problems[str(key)] = str(error)
        return None


class Unresponsive(Exception):
    """The replica stopped answering; the call may be made again on another."""


def _open(endpoint: Endpoint, credentials: grpc.ChannelCredentials | None) -> grpc.aio.Channel:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        # Above what the questions send anyway: a dead peer is noticed, a healthy one never sees too many pings.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 2_000),
        ("grpc.enable_retries", 0),  # the executor retries by itself, on another replica
        # One connection for each channel, so that its state is the connection's.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.lb_policy_name", "pick_first"),
    ]
    if endpoint.server_name is not None:
        options.append(("grpc.default_authority", endpoint.server_name))
        if credentials is not None:
            options.append(("grpc.ssl_target_name_override", endpoint.server_name))
    if credentials is None:
        return grpc.aio.insecure_channel(endpoint.target, options=options)
    return grpc.aio.secure_channel(endpoint.target, credentials, options=options)
