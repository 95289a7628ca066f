"""How a client reaches a gateway: credentials, token, limits, channel options."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import grpc

from service.client.errors import GatewayError
from service.client.retry import RetryPolicy

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

    from service.client.tracing import ClientTracing

ChannelOption = tuple[str, str | int]
Metadata = tuple[tuple[str, str], ...]

_LOOPBACK = re.compile(
    r"(unix|unix-abstract|vsock):|((dns:///?|ipv4:|ipv6:)?(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?$)"
)

_DEFAULT_CHANNEL_OPTIONS: tuple[ChannelOption, ...] = (
    # The gateway limits what it takes and what it sends; a limit of gRPC's own would end the stream of everybody.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A name that stands for several gateways: new streams and calls go round.
    ("grpc.lb_policy_name", "round_robin"),
    # A gateway that is back is found soon; gRPC's own default grows to two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A connection that died without a word is noticed while answers are waited for.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientOptions:
    """Everything that the two clients take beside the target.

    Attributes:
        credentials: For TLS, for example ``grpc.ssl_channel_credentials(ca)``; None connects in the clear.
        token: Bearer token, or a function that returns the present one, asked on each call and each new stream. It
            never goes in the clear to anything but this machine, unless ``insecure_token``.
        insecure_token: Send the token in the clear: where something else protects the connection, such as a mesh.
        options: gRPC channel options; they win over the client's own.
        timeout: Time limit in seconds of calls and steps that name none.
        retry: How what fails is tried again.
        max_message_bytes: The size past which the steps that wait at the same moment go into another message.
        tracer_provider: OpenTelemetry's, for spans of calls and steps (extra ``tracing``); None traces nothing.
    """

    credentials: grpc.ChannelCredentials | None = None
    token: str | Callable[[], str] | None = field(default=None, repr=False)
    insecure_token: bool = False
    options: Sequence[ChannelOption] = ()
    timeout: float = 60.0
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    max_message_bytes: int = 2 * 1024 * 1024
    tracer_provider: "TracerProvider | None" = None

    def tracing(self) -> "ClientTracing | None":
        """What makes spans; None where nothing is traced, and then OpenTelemetry is not imported."""
        if self.tracer_provider is None:
            return None
        from service.client.tracing import ClientTracing

        return ClientTracing(self.tracer_provider)

    def check(self, target: str) -> None:
        """Checks what can be checked before connecting.

        Raises:
            ValueError: something is out of range, or the token would be sent in the clear.
        """
        if not 0 < self.timeout < 1e9:
            raise ValueError(f"timeout is {self.timeout} s; expected more than 0 and finite")
        if self.max_message_bytes < 1024:
            raise ValueError(f"max_message_bytes is {self.max_message_bytes}; expected at least 1024")
        in_the_clear = self.token is not None and self.credentials is None and not self.insecure_token
        if in_the_clear and not _LOOPBACK.match(target):
            raise ValueError(
                f"a token for {target!r} would be sent in the clear; give credentials=grpc.ssl_channel_credentials(), "
                "or insecure_token=True where something else protects the connection"
            )

    def channel_options(self) -> list[ChannelOption]:
        """Channel options: the client's own, and the caller's over them."""
        return list({name: (name, value) for name, value in (*_DEFAULT_CHANNEL_OPTIONS, *self.options)}.values())

    def metadata(self, traceparent: str = "") -> Metadata:
        """What goes with each call and each stream.

        Args:
            traceparent: The trace context of what is called; empty where it is in no trace.

        Raises:
            GatewayError: UNAUTHENTICATED; the function that returns the token failed (which is its ``__cause__``).
        """
        context = (("traceparent", traceparent),) if traceparent else ()
        if self.token is None:
            return context
        try:
            token = self.token() if callable(self.token) else self.token
        except Exception as error:
            raise GatewayError(grpc.StatusCode.UNAUTHENTICATED, f"no token could be had: {error!r}") from error
        return (("authorization", f"Bearer {token}"), *context)
