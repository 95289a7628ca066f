"""One connection to the store, and the task that owns it.

Orders that wait at the same moment go out in one pipeline: one round trip, and one wait for durability, for all of
them. While it is under way the next gather. The link never sends anything twice: an order that the server refused was
not carried out (``StoreUnavailable``), and what became of one that was sent and not answered is unknown
(``NoAnswer``). The next order finds a new connection, so a store that comes back is used again at once.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, RedisError

from service.errors import StoreUnavailable
from service.sessions.redis.durability import Durability
from service.sessions.redis.endpoint import Dial
from service.sessions.redis.scripts import Script

_log = logging.getLogger(__name__)

# What one pipeline holds at most, so that it fits the time limit of an exchange.
_MAX_ORDERS = 512
_MAX_BYTES = 8 * 1024 * 1024
# Error codes with which the server refuses a command before it does anything of it.
_REFUSALS = frozenset(
    ("BUSY", "LOADING", "MASTERDOWN", "MISCONF", "NOAUTH", "NOREPLICAS", "NOSCRIPT", "OOM", "READONLY")
)
# Of these, those that another server may not answer with: look for the primary anew.
_MOVED_ON = frozenset({"LOADING", "MASTERDOWN", "READONLY"})

Argument = str | bytes | int


class NoAnswer(Exception):
    """An order was sent and not answered: it may have been carried out, or be so later."""


class ConnectionLost(NoAnswer):
    """The connection broke: perhaps it had long been dead, and the order never arrived."""


class Barrier(NamedTuple):
    """What each pipeline ends with: a write of its own, so that all before it is covered, and a wait for it."""

    key: str
    durability: Durability
    timeout: float

    def commands(self) -> list[tuple[Argument, ...]]:
        """The write and the wait."""
        return [("INCR", self.key), self.durability.command(round(1000 * self.timeout))]


class _Order(NamedTuple):
    script: Script
    keys: Sequence[str]
    arguments: Sequence[Argument]
    reply: "asyncio.Future[list[Any]]"

    @property
    def nbytes(self) -> int:
        return sum(len(argument) for argument in self.arguments if isinstance(argument, bytes))

    def command(self, *, whole: bool) -> tuple[Argument, ...]:
        name, body = ("EVAL", self.script.source) if whole else ("EVALSHA", self.script.sha)
        return (name, body, len(self.keys), *self.keys, *self.arguments)


class Link:
    """Carries out scripts on the store.

    Args:
        dial: Makes the connection.
        timeout: Seconds that one exchange may take.
        connect_timeout: Seconds that connecting may take.
        barrier: What the orders must reach before they are answered, if anything.
    """

    def __init__(self, dial: Dial, *, timeout: float, connect_timeout: float, barrier: Barrier | None = None) -> None:
        self._dial = dial
        self._timeout = timeout + (barrier.timeout if barrier else 0.0)
        self._connect_timeout = connect_timeout
        self._barrier = barrier
        self._orders: deque[_Order] = deque()
        self._filled = asyncio.Event()
        self._connection: AbstractConnection | None = None
        self._worker: asyncio.Task[None] | None = None
        self._closed = False
        self._reachable = True
        self.exchanges = 0

    def call(self, script: Script, keys: Sequence[str], *arguments: Argument) -> "asyncio.Future[list[Any]]":
        """Runs one script, soon; the future is for what it returned.

        Raises:
            StoreUnavailable: it was not run. The future may be told this too, and
            NoAnswer: it was sent; nobody knows.
        """
        if self._closed:
            raise StoreUnavailable("the gateway has closed its connection to the store")
        if self._worker is None:
            self._worker = asyncio.create_task(self._work(), name="link to the session store")
        order = _Order(script, keys, arguments, asyncio.get_running_loop().create_future())
        self._orders.append(order)
        self._filled.set()
        return order.reply

    async def close(self) -> None:
        """Ends the connection; what waits is refused. Safe to call twice."""
        self._closed = True
        if self._worker is not None:
            self._worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._worker
        for order in self._orders:
            _refuse(order, "the gateway has closed its connection to the store")
        self._orders.clear()
        await self._drop()

    async def _work(self) -> None:
        while True:
            await self._filled.wait()
            orders = self._take()
            if not self._orders:
                self._filled.clear()
            try:
                if orders:
                    await self._carry_out(orders)
            except Exception as error:  # noqa: BLE001 - a worker that died would leave every caller hanging for good
                _log.exception("the link to the session store failed in a way that it should not")
                await self._drop()
                for order in orders:
                    if not order.reply.done():
                        order.reply.set_exception(NoAnswer(f"internal error: {type(error).__name__}"))

    def _take(self) -> list[_Order]:
        """The orders of the next pipeline, without those whose caller has gone."""
        orders: list[_Order] = []
        nbytes = 0
        while self._orders and len(orders) < _MAX_ORDERS and nbytes < _MAX_BYTES:
            order = self._orders.popleft()
            if not order.reply.done():
                orders.append(order)
                nbytes += order.nbytes
        return orders

    async def _carry_out(self, orders: Sequence[_Order]) -> None:
        connection = await self._connected(orders)
        if connection is None:
            return
        unknown = await self._exchange(connection, orders, whole=False)
        # The server does not have the scripts yet, or no longer: it has restarted or failed over.
        if unknown and self._connection is not None:
            await self._exchange(self._connection, unknown, whole=True)
        elif unknown:
            for order in unknown:
                _refuse(order, "the connection to the session store was lost")

    async def _connected(self, orders: Sequence[_Order]) -> AbstractConnection | None:
        """A connection on which the server answers; None, and the orders refused, where there is none."""
        try:
            if self._connection is not None and await self._connection.can_read():
                await self._drop()  # closed by the server, or out of step
            if self._connection is None:
                async with asyncio.timeout(self._connect_timeout):
                    self._connection = await self._connect()
                self._tell_reachable(None)
        except (RedisError, OSError, TimeoutError) as error:
            await self._drop()
            self._tell_reachable(error)
            for order in orders:
                _refuse(order, "the session store cannot be reached")
        except asyncio.CancelledError:
            for order in orders:
                _refuse(order, "the gateway closed before the session store could be asked")
            raise
        return self._connection

    def _tell_reachable(self, error: Exception | None) -> None:
        """Tells the operator, once each time, what clients need not know: where it was looked for, and what it said."""
        if error is not None and self._reachable:
            _log.warning("the session store cannot be reached: %s", _text(error))
        elif error is None and not self._reachable:
            _log.info("the session store is reached again")
        self._reachable = error is None

    async def _connect(self) -> AbstractConnection:
        connection = await self._dial()
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # redis-py's
            # Asked before anything else: a server that is loading, stopped or cannot wait for its disk says so now.
            probe: list[tuple[Argument, ...]] = [("PING",)]
            if self._barrier is not None and self._barrier.durability.aof:
                probe.append(("WAITAOF", 1, 0, 1))
            await connection.send_packed_command(_pack(probe), check_health=False)
            for _ in probe:
                await connection.read_response()
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        return connection

    async def _exchange(self, connection: AbstractConnection, orders: Sequence[_Order], *, whole: bool) -> list[_Order]:
        """One pipeline out, its replies in, each order told; returns those whose script the server does not have."""
        self.exchanges += 1
        commands = [order.command(whole=whole) for order in orders]
        replies: list[object] = []
        lost: NoAnswer | None = None
        try:
            async with asyncio.timeout(self._timeout):
                barrier = self._barrier.commands() if self._barrier is not None else []
                packed = _pack([*commands, *barrier])
                await connection.send_packed_command(packed, check_health=False)
                for _ in commands:
                    replies.append(await _read(connection))  # noqa: PERF401 - those that came count, where one fails
                lost = await self._await_barrier(connection)
        except TimeoutError:
            lost = NoAnswer(f"the session store did not answer within {self._timeout} s")
            await self._drop()
        except (RedisError, OSError) as error:
            _log.info("the connection to the session store was lost: %s", _text(error))
            lost = ConnectionLost("the connection to the session store was lost")
            await self._drop()
        except asyncio.CancelledError:
            await self._drop()
            self._tell(orders, replies, NoAnswer("the gateway closed while the session store was asked"))
            raise
        if any(_code(reply) in _MOVED_ON for reply in replies):
            await self._drop()
        return self._tell(orders, replies, lost)

    async def _await_barrier(self, connection: AbstractConnection) -> NoAnswer | None:
        """Reads the barrier's answers; returns why it was not reached, if it was not."""
        if self._barrier is None:
            return None
        written, waited = await _read(connection), await _read(connection)
        if isinstance(written, RedisError):
            return NoAnswer(f"the session store takes no writes: {_code(written)}")
        if not self._barrier.durability.reached(waited):
            return NoAnswer(
                f"the session store is not as durable as asked: {self._barrier.durability}, reached {waited}"
            )
        return None

    def _tell(self, orders: Sequence[_Order], replies: Sequence[object], lost: NoAnswer | None) -> list[_Order]:
        """Resolves each order by its reply, or by how it was lost; returns those whose script is not there."""
        unknown: list[_Order] = []
        for number, order in enumerate(orders):
            reply = replies[number] if number < len(replies) else None
            if isinstance(reply, NoScriptError):
                unknown.append(order)
            elif isinstance(reply, RedisError) and _code(reply) in _REFUSALS:
                _refuse(order, f"the session store takes no orders now: {_code(reply)}")
            elif order.reply.done():
                continue
            elif isinstance(reply, RedisError):
                _log.error("the session store failed: %s", _text(reply))
                order.reply.set_exception(NoAnswer(f"the session store failed: {_code(reply)}"))
            elif lost is not None and (reply is None or self._barrier is not None):
                order.reply.set_exception(type(lost)(*lost.args))  # one of its own: each is raised somewhere else
            elif isinstance(reply, list):
                order.reply.set_result(reply)
            else:
                order.reply.set_exception(NoAnswer("the session store answered something else"))
        return unknown

    async def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.disconnect(nowait=True)


def _pack(commands: Sequence[Sequence[Argument]]) -> bytes:
    """Commands in the server's protocol, arrays of bulk strings; several times cheaper than the library does it."""
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d\r\n" % len(command))
        for argument in command:
            data = argument if isinstance(argument, bytes) else str(argument).encode()
            parts += (b"$%d\r\n" % len(data), data, b"\r\n")
    return b"".join(parts)


async def _read(connection: AbstractConnection) -> object:
    """The next reply; an error that the server answered is one too, and the connection goes on."""
    try:
        return await connection.read_response(disable_decoding=True, disconnect_on_error=False)
    except RedisError as error:
        if _code(error):
            return error
        raise


def _code(reply: object) -> str:
    """The error code that the server answered with; nothing for other replies and for the client's own errors."""
    if not isinstance(reply, RedisError):
        return ""
    code = getattr(reply, "status_code", None) or str(reply).partition(" ")[0]
    return code if code.isupper() else ""


def _refuse(order: _Order, message: str) -> None:
    if not order.reply.done():
        order.reply.set_exception(StoreUnavailable(message))


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
