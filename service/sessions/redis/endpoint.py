"""Where the store is: its URL, and a connection to the primary that it names.

==============================================  ==================================================================
``redis://[[user]:password@]host[:6379][/db]``  TCP
``rediss://...``                                TLS; ``?ssl_ca_certs=``, ``ssl_certfile=``, ``ssl_keyfile=``
``unix://[[user]:password@]/path.sock[?db=0]``  a Unix socket
``redis+sentinel://[...@]h1[:26379],h2/name``   Sentinels that are asked for the primary of ``name``; ``[/db]`` after
                                                it, ``?sentinel_password=``, ``sentinel_username=``
``rediss+sentinel://...``                       the same, TLS to the primary and to the Sentinels
==============================================  ==================================================================
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection, parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

# Makes a connection that is not connected yet; asks the Sentinels, where there are any, each time anew.
Dial = Callable[[], Awaitable[AbstractConnection]]

_SENTINEL = re.compile(r"(?P<tls>rediss?)\+sentinel")
_SENTINEL_PORT = 26379


def dialer(url: str, *, connect_timeout: float) -> Dial:
    """How to reach the store of ``url``.

    Raises:
        ValueError: it is no URL of the table above.
    """
    match = _SENTINEL.fullmatch(urlsplit(url).scheme)
    if match is None:
        options: dict[str, Any] = {**parse_url(url)}
        kind = options.pop("connection_class", Connection)
        return _fixed(kind, {**options, **_common(connect_timeout)})
    return _sentinel(url, match["tls"], connect_timeout)


def redacted(url: str) -> str:
    """The URL without its user and password, for logs and messages."""
    parts = urlsplit(url)
    credentials, at, hosts = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{'***' if credentials else ''}{at}{hosts}", query=""))


def _common(connect_timeout: float) -> dict[str, Any]:
    # Nothing is ever sent twice by the client library: whether that is safe is for the store to decide.
    # The link has a time limit of its own for each exchange, hence none for the socket.
    return {
        "socket_connect_timeout": connect_timeout,
        "socket_timeout": None,
        "retry": Retry(NoBackoff(), 0),
        "driver_info": None,
        "protocol": 2,
    }


def _fixed(kind: type[AbstractConnection], options: Mapping[str, Any]) -> Dial:
    async def dial() -> AbstractConnection:
        return kind(**options)

    return dial


def _sentinel(url: str, scheme: str, connect_timeout: float) -> Dial:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    name, _, database = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError(f"expected redis+sentinel://HOST[,HOST...]/NAME: the name of the primary; got {redacted(url)}")
    at = f"{credentials}@" if credentials else ""
    options: dict[str, Any] = {**parse_url(f"{scheme}://{at}primary/{database or 0}?{parts.query}")}
    kind = options.pop("connection_class", Connection)
    options.pop("host")
    login = {key: options.pop(f"sentinel_{key}", None) for key in ("username", "password")}
    tls = {key: value for key, value in options.items() if key.startswith("ssl_")}
    common = _common(connect_timeout)
    sentinel_options = {**login, **tls, **common, "socket_timeout": connect_timeout, "ssl": kind is SSLConnection}

    async def dial() -> AbstractConnection:
        # Its connections are closed each time: a failover is when they matter, and then they are old.
        addresses = [_host_port(host) for host in hosts.split(",")]
        sentinel = Sentinel(addresses, sentinel_kwargs=sentinel_options)  # type: ignore[no-untyped-call]  # redis-py's
        try:
            host, port = await sentinel.discover_master(name)
        finally:
            for client in sentinel.sentinels:
                await client.aclose()
        connection: AbstractConnection = kind(**{**options, **common, "host": host, "port": port})
        return connection

    return dial


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return (host.strip("[]"), int(port)) if host else (text, _SENTINEL_PORT)
