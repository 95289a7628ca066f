# A time limit goes to the gateway with the request: cutting a call off from outside would leave its work running.
# ruff: noqa: ASYNC109
"""The asyncio client: ``AsyncSequenceClient`` and its sessions. What it does is what the blocking client does."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import grpc
import numpy.typing as npt

from service.client import calls, values, wire
from service.client.aio_connection import AsyncConnection
from service.client.blocks import Block, together
from service.client.errors import GatewayError
from service.client.options import ChannelOption, ClientOptions
from service.client.retry import RetryPolicy
from service.client.steps import Line, Step
from service.client.wire import FloatArray

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

# A session that is left because of an exception is deleted in passing: its caller has other worries.
_FAREWELL_TIMEOUT_S = 2.0


class AsyncSequenceClient:
    """Talks to a gateway from one event loop; make it while that loop runs. See ``SequenceClient`` for the rest.

    Steps that are asked for before the event loop gets its turn go out in one message: ``asyncio.gather`` over the
    steps of many sessions is all that it takes. uvloop makes it faster.

    Args:
        target: A gRPC target: ``"host:port"``, or a name that stands for several gateways, ``"dns:///name:port"``.
        credentials: For TLS; None connects in the clear.
        token: Bearer token, or a function that returns the present one.
        insecure_token: Send the token without TLS to other machines.
        options: gRPC channel options.
        timeout: Time limit in seconds of calls and steps that name none.
        retry: How what fails is tried again.
        max_message_bytes: The size past which the steps that wait at the same moment go into another message.
        tracer_provider: OpenTelemetry's, for spans of calls and steps; None traces nothing.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: no event loop runs.
    """

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | Callable[[], str] | None = None,
        insecure_token: bool = False,
        options: Sequence[ChannelOption] = (),
        timeout: float = 60.0,
        retry: RetryPolicy | None = None,
        max_message_bytes: int = 2 * 1024 * 1024,
        tracer_provider: "TracerProvider | None" = None,
    ) -> None:
        settings = ClientOptions(
            credentials=credentials,
            token=token,
            insecure_token=insecure_token,
            options=options,
            timeout=timeout,
            retry=retry or RetryPolicy(),
            max_message_bytes=max_message_bytes,
            tracer_provider=tracer_provider,
        )
        self._connection = AsyncConnection(target, settings)

    def create_session(
        self,
        model: str,
        *,
        version: int | None = None,
        ttl: float | None = None,
        session_id: str | None = None,
        timeout: float | None = None,
    ) -> "Opening":
        """Opens a session: ``await`` it, or use it as an ``async with``, which deletes the session at its end.

        Arguments and errors are those of ``SequenceClient.create_session``.
        """
        return Opening(self._connection, calls.create_session(model, version, ttl, session_id), timeout)

    session = create_session

    async def attach(
        self, session_id: str, *, position: int | None = None, timeout: float | None = None
    ) -> "AsyncSession":
        """Goes on with a session that is there already. See ``SequenceClient.attach``."""
        if position is None:
            position = (await self._connection.invoke(calls.get_session(session_id), timeout)).position
        elif position < 0:
            raise ValueError(f"position is {position}; expected 0 or more")
        return AsyncSession(self._connection, session_id, position, owned=False)

    @overload
    async def step_many(
        self,
        steps: Sequence[tuple["AsyncSession", npt.ArrayLike]],
        *,
        timeout: float | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[FloatArray]: ...
    @overload
    async def step_many(
        self,
        steps: Sequence[tuple["AsyncSession", npt.ArrayLike]],
        *,
        timeout: float | None = None,
        return_exceptions: bool,
    ) -> list[FloatArray | GatewayError]: ...
    async def step_many(
        self,
        steps: Sequence[tuple["AsyncSession", npt.ArrayLike]],
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> Any:
        """Steps many sessions at once: the cheapest way. See ``SequenceClient.step_many``."""
        deadline = self._connection.deadline(timeout)
        if not steps:
            return []
        turn, connection = _Turn(), self._connection
        lines = [session.line_of(connection) for session, _ in steps]
        asked = together(lines, wire.as_all_inputs([inputs for _, inputs in steps]), deadline, turn.done)
        await turn.run(asked, connection)
        asked.mark_seen()
        return asked.outcomes() if return_exceptions else asked.results()

    async def models(self, *, timeout: float | None = None) -> list[values.Model]:
        """What is served, by name."""
        return await self._connection.invoke(calls.list_models(), timeout)

    async def model(self, name: str, *, timeout: float | None = None) -> values.Model:
        """One model and its versions.

        Raises:
            ModelNotFound: it is not served.
        """
        return await self._connection.invoke(calls.get_model(name), timeout)

    async def sessions(self, *, page_size: int = 0, timeout: float | None = None) -> AsyncIterator[values.SessionInfo]:
        """The caller's sessions, asked for page by page."""
        token = ""
        while True:
            page, token = await self._connection.invoke(calls.list_sessions(page_size, token), timeout)
            for info in page:
                yield info
            if not token:
                return

    def restore(
        self, snapshot: bytes, *, session_id: str | None = None, ttl: float | None = None, timeout: float | None = None
    ) -> "Opening":
        """A new session from ``session.snapshot()``, on any served version of the same model."""
        return Opening(self._connection, calls.restore_session(snapshot, session_id, ttl), timeout)

    async def close(self) -> None:
        """Fails what is under way and disconnects. Sessions stay with the gateway. Safe to call twice."""
        await self._connection.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class AsyncSession:
    """A session: a recurrent state that the gateway keeps, and where this client has got to in it.

    Any number of tasks may use it; its steps run one at a time, in the order in which they were asked for. Made by
    ``AsyncSequenceClient``, never by hand.
    """

    def __init__(self, connection: AsyncConnection, session_id: str, position: int, *, owned: bool) -> None:
        self._connection = connection
        self._line = Line(session_id, position)
        self._owned = owned

    @property
    def session_id(self) -> str:
        """Its id: what ``client.attach`` takes. Who knows it (and has the token) can step the session."""
        return self._line.session_id

    @property
    def position(self) -> int:
        """Time steps that it has consumed, as far as this client was told."""
        return self._line.position

    async def step(self, inputs: npt.ArrayLike, *, timeout: float | None = None) -> FloatArray:
        """Feeds the next time steps ``[time, input_dim]``; returns ``[time, output_dim]``. See ``Session.step``.

        A task that is cancelled in it gives the step up; whether it was applied shows when the same step is repeated.
        """
        turn = _Turn()
        step = Step(self._line, wire.as_inputs(inputs), self._connection.deadline(timeout), turn.done)
        await turn.run(step, self._connection)
        return step.result()

    def line_of(self, connection: AsyncConnection) -> Line:
        """Where this session's steps line up: for ``AsyncSequenceClient.step_many``.

        Raises:
            ValueError: the session belongs to another client.
        """
        if connection is not self._connection:
            raise ValueError(f"session {self.session_id!r} belongs to another client")
        return self._line

    async def inspect(self, *, timeout: float | None = None) -> dict[str, FloatArray]:
        """Its state as of the last step that was applied, by name: memory, weightings, controller state."""
        return await self._connection.invoke(calls.inspect_session(self.session_id), timeout)

    async def info(self, *, timeout: float | None = None) -> values.SessionInfo:
        """What the gateway says about it."""
        return await self._connection.invoke(calls.get_session(self.session_id), timeout)

    def fork(
        self, *, session_id: str | None = None, ttl: float | None = None, timeout: float | None = None
    ) -> "Opening":
        """A new session with the state and position that this one has with the gateway."""
        return Opening(self._connection, calls.fork_session(self.session_id, session_id, ttl), timeout)

    async def snapshot(self, *, timeout: float | None = None) -> bytes:
        """Its state as an opaque blob, for ``client.restore``."""
        return await self._connection.invoke(calls.snapshot_session(self.session_id), timeout)

    async def close(self, *, timeout: float | None = None) -> None:
        """Deletes the session. Steps of it that have no outcome yet fail. Safe to call twice."""
        if self._line.closed:
            return
        self._connection.tasks.close_line(self._line, f"session {self.session_id!r} is closed")
        await self._connection.invoke(calls.delete_session(self.session_id), timeout)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._owned:
            return
        if error is None:
            await self.close()
            return
        try:
            await self.close(timeout=_FAREWELL_TIMEOUT_S)
        except GatewayError as failure:
            error.add_note(f"session {self.session_id!r} was not deleted and will expire: {failure}")

    def __repr__(self) -> str:
        return f"AsyncSession(session_id={self.session_id!r}, position={self.position})"


class Opening:
    """A session that is being opened: ``await`` it, or ``async with`` it."""

    def __init__(
        self, connection: AsyncConnection, call: calls.Call[values.SessionInfo], timeout: float | None
    ) -> None:
        self._connection = connection
        self._call = call
        self._timeout = timeout
        self._session: AsyncSession | None = None

    def __await__(self) -> Generator[Any, None, AsyncSession]:
        return self._open().__await__()

    async def __aenter__(self) -> AsyncSession:
        self._session = await self._open()
        return self._session

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.__aexit__(kind, error, trace)

    async def _open(self) -> AsyncSession:
        info = await self._connection.invoke(self._call, self._timeout)
        return AsyncSession(self._connection, info.session_id, info.position, owned=True)


class _Turn:
    """Waits for a step, or a block of them."""

    def __init__(self) -> None:
        self._done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def done(self, _: object) -> None:
        """The outcome is there."""
        if not self._done.done():
            self._done.set_result(None)

    async def run(self, step: Step | Block, connection: AsyncConnection) -> None:
        """Sends it and returns once all of it has its outcome. Cancelled, it gives up what has none."""
        try:
            connection.tasks.submit(step)
            await self._done
        except asyncio.CancelledError:
            connection.tasks.cancel(step)
            step.mark_seen()
            raise
