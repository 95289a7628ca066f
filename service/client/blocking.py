"""The blocking client: ``SequenceClient`` and its sessions."""

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import grpc
import numpy.typing as npt

from service.client import calls, values, wire
from service.client.blocks import together
from service.client.connection import Connection
from service.client.errors import GatewayError
from service.client.futures import StepFuture, Turn
from service.client.options import ChannelOption, ClientOptions
from service.client.retry import RetryPolicy
from service.client.steps import Line, Step
from service.client.wire import FloatArray

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

# A session that is left because of an exception is deleted in passing: its caller has other worries.
_FAREWELL_TIMEOUT_S = 2.0


class SequenceClient:
    """Talks to a gateway, from any number of threads.

    Steps that wait at the same moment, of whatever sessions and threads, go out in one message. What fails in a way
    that passes (a gateway that restarts, a broken stream) is tried again until its time limit; a step is applied
    exactly once all the same. Errors are ``GatewayError``s, which are ``grpc.RpcError``s.

    A client has threads and a connection: make one for each process (after forking, never before) and keep it.

    Args:
        target: A gRPC target: ``"host:port"``, or a name that stands for several gateways, ``"dns:///name:port"``.
        credentials: See ``ClientOptions``, like all the rest.
        token: Bearer token, or a function that returns the present one.
        insecure_token: Send the token without TLS to other machines.
        options: gRPC channel options.
        timeout: Time limit in seconds of calls and steps that name none.
        retry: How what fails is tried again.
        max_message_bytes: The size past which the steps that wait at the same moment go into another message.
        tracer_provider: OpenTelemetry's, for spans of calls and steps; None traces nothing.

    Raises:
        ValueError: an argument is out of range.
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
        self._connection = Connection(target, settings)

    def create_session(
        self,
        model: str,
        *,
        version: int | None = None,
        ttl: float | None = None,
        session_id: str | None = None,
        timeout: float | None = None,
    ) -> "Session":
        """Opens a session in the model's initial state.

        Args:
            model: The model's name.
            version: Which of its versions; None takes the newest. The session stays on it.
            ttl: Seconds that the session lives past its last step; None takes the gateway's default.
            session_id: ``[A-Za-z0-9_-]{1,64}``; None makes one of 128 random bits. The same id, model, version and ttl
                again find the session that is there, wherever it stands.
            timeout: Time limit in seconds.

        Returns:
            The session. As a context manager it is deleted at the end of its ``with`` block.

        Raises:
            ModelNotFound: no such model or version.
            GatewayError: see docs/api.md.
        """
        info = self._connection.invoke(calls.create_session(model, version, ttl, session_id), timeout)
        return Session(self._connection, info.session_id, info.position, owned=True)

    session = create_session

    def attach(self, session_id: str, *, position: int | None = None, timeout: float | None = None) -> "Session":
        """Goes on with a session that is there already, opened here or anywhere, through any gateway.

        Args:
            session_id: Its id.
            position: Where its next step begins: what its last holder knew. None asks the gateway where it stands.
            timeout: Time limit in seconds of asking.

        Returns:
            The session. The end of a ``with`` block leaves it be, since it was not opened there.

        Raises:
            SessionNotFound: it was asked for and is not there.
        """
        if position is None:
            position = self._connection.invoke(calls.get_session(session_id), timeout).position
        elif position < 0:
            raise ValueError(f"position is {position}; expected 0 or more")
        return Session(self._connection, session_id, position, owned=False)

    @overload
    def step_many(
        self,
        steps: Sequence[tuple["Session", npt.ArrayLike]],
        *,
        timeout: float | None = None,
        return_exceptions: Literal[False] = False,
    ) -> list[FloatArray]: ...
    @overload
    def step_many(
        self,
        steps: Sequence[tuple["Session", npt.ArrayLike]],
        *,
        timeout: float | None = None,
        return_exceptions: bool,
    ) -> list[FloatArray | GatewayError]: ...
    def step_many(
        self,
        steps: Sequence[tuple["Session", npt.ArrayLike]],
        *,
        timeout: float | None = None,
        return_exceptions: bool = False,
    ) -> Any:
        """Steps many sessions at once: the cheapest way, since they share messages and the model's batch.

        Args:
            steps: Sessions of this client and their inputs ``[time, input_dim]``. A session may come several times;
                its steps run in this order.
            timeout: Time limit in seconds of each step.
            return_exceptions: Put the ``GatewayError`` of a step that failed in its place, rather than raise.

        Returns:
            The outputs ``[time, output_dim]`` in the order of ``steps``, yours to write to. They may be views of one
            array that holds the outputs of this call and nothing else.

        Raises:
            GatewayError: what went wrong with the first step that failed, once all have their outcome.
        """
        deadline = self._connection.deadline(timeout)
        if not steps:
            return []
        turn, connection = Turn(), self._connection
        lines = [session.line_of(connection) for session, _ in steps]
        asked = together(lines, wire.as_all_inputs([inputs for _, inputs in steps]), deadline, turn.done)
        turn.run(asked, connection.threads)
        asked.mark_seen()
        return asked.outcomes() if return_exceptions else asked.results()

    def models(self, *, timeout: float | None = None) -> list[values.Model]:
        """What is served, by name."""
        return self._connection.invoke(calls.list_models(), timeout)

    def model(self, name: str, *, timeout: float | None = None) -> values.Model:
        """One model and its versions.

        Raises:
            ModelNotFound: it is not served.
        """
        return self._connection.invoke(calls.get_model(name), timeout)

    def sessions(self, *, page_size: int = 0, timeout: float | None = None) -> Iterator[values.SessionInfo]:
        """The caller's sessions, asked for page by page."""
        token = ""
        while True:
            page, token = self._connection.invoke(calls.list_sessions(page_size, token), timeout)
            yield from page
            if not token:
                return

    def restore(
        self, snapshot: bytes, *, session_id: str | None = None, ttl: float | None = None, timeout: float | None = None
    ) -> "Session":
        """A new session from ``session.snapshot()``, on any served version of the same model."""
        info = self._connection.invoke(calls.restore_session(snapshot, session_id, ttl), timeout)
        return Session(self._connection, info.session_id, info.position, owned=True)

    def close(self) -> None:
        """Fails what is under way and disconnects. Sessions stay with the gateway. Safe to call twice."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Session:
    """A session: a recurrent state that the gateway keeps, and where this client has got to in it.

    It may be used from several threads; its steps run one at a time, in the order in which they were asked for.
    Made by ``SequenceClient``, never by hand.
    """

    def __init__(self, connection: Connection, session_id: str, position: int, *, owned: bool) -> None:
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

    def step(self, inputs: npt.ArrayLike, *, timeout: float | None = None) -> FloatArray:
        """Feeds the next time steps and returns what the model makes of them.

        After an error the session stands where it stood. If ``error.outcome_unknown``, the same step again is safe and
        returns its outputs, whether it had been applied or not; another step instead is applied if the first was not,
        and raises ``StepConflict`` if it was.

        Args:
            inputs: ``[time, input_dim]``, any real dtype; sent as float32.
            timeout: Time limit in seconds, retries included.

        Returns:
            ``[time, output_dim]``, float32.

        Raises:
            PositionMismatch: somebody else stepped the session; ``error.position`` says where it stands.
            SessionNotFound: it has expired or was deleted.
            GatewayError: see docs/api.md.
            TypeError: ``inputs`` are not real numbers.
        """
        turn = Turn()
        step = Step(self._line, wire.as_inputs(inputs), self._connection.deadline(timeout), turn.done)
        turn.run(step, self._connection.threads)
        return step.result()

    def line_of(self, connection: Connection) -> Line:
        """Where this session's steps line up: for ``SequenceClient.step_many``.

        Raises:
            ValueError: the session belongs to another client.
        """
        if connection is not self._connection:
            raise ValueError(f"session {self.session_id!r} belongs to another client")
        return self._line

    def step_async(self, inputs: npt.ArrayLike, *, timeout: float | None = None) -> StepFuture:
        """Like ``step``, but returns a future at once. Steps may be asked for ahead: they run in order."""
        future = StepFuture()
        step = Step(self._line, wire.as_inputs(inputs), self._connection.deadline(timeout), future.resolve)
        future.track(step, self._connection.threads)
        self._connection.threads.check_process()
        self._connection.threads.submit(step)
        return future

    def inspect(self, *, timeout: float | None = None) -> dict[str, FloatArray]:
        """Its state as of the last step that was applied, by name: memory, weightings, controller state.

        The names and shapes are in ``client.model(name).versions[...].state_layout``.
        """
        return self._connection.invoke(calls.inspect_session(self.session_id), timeout)

    def info(self, *, timeout: float | None = None) -> values.SessionInfo:
        """What the gateway says about it."""
        return self._connection.invoke(calls.get_session(self.session_id), timeout)

    def fork(
        self, *, session_id: str | None = None, ttl: float | None = None, timeout: float | None = None
    ) -> "Session":
        """A new session with the state and position that this one has with the gateway."""
        info = self._connection.invoke(calls.fork_session(self.session_id, session_id, ttl), timeout)
        return Session(self._connection, info.session_id, info.position, owned=True)

    def snapshot(self, *, timeout: float | None = None) -> bytes:
        """Its state as an opaque blob, for ``client.restore``."""
        return self._connection.invoke(calls.snapshot_session(self.session_id), timeout)

    def close(self, *, timeout: float | None = None) -> None:
        """Deletes the session. Steps of it that have no outcome yet fail. Safe to call twice."""
        if self._line.closed:
            return
        self._connection.threads.check_process()
        self._connection.threads.close_line(self._line, f"session {self.session_id!r} is closed")
        self._connection.invoke(calls.delete_session(self.session_id), timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._owned:
            return
        if error is None:
            self.close()
            return
        try:
            self.close(timeout=_FAREWELL_TIMEOUT_S)
        except GatewayError as failure:
            error.add_note(f"session {self.session_id!r} was not deleted and will expire: {failure}")

    def __repr__(self) -> str:
        return f"Session(session_id={self.session_id!r}, position={self.position})"
