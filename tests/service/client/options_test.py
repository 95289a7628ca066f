import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.client import GatewayError, RetryPolicy
from service.client.options import ClientOptions
from service.client.retry import repeats_stream


@pytest.mark.parametrize(
    "target", ["gateway.example:443", "dns:///gateway:50051", "10.0.0.7:50051", "localhost.evil:1"]
)
def test_a_token_is_not_sent_in_the_clear_to_another_machine(target):
    with pytest.raises(ValueError, match="in the clear"):
        ClientOptions(token="secret").check(target)
    ClientOptions(token="secret", credentials=grpc.ssl_channel_credentials()).check(target)
    ClientOptions(token="secret", insecure_token=True).check(target)
    ClientOptions().check(target)


@pytest.mark.parametrize(
    "target", ["127.0.0.1:50051", "localhost:1", "[::1]:1", "unix:gateway.sock", "dns:///localhost:1"]
)
def test_a_token_may_go_to_this_machine(target):
    ClientOptions(token="secret").check(target)


def test_a_token_stays_out_of_what_is_printed():
    assert "secret" not in repr(ClientOptions(token="secret"))


def test_a_token_may_change():
    tokens = iter(["one", "two"])
    options = ClientOptions(token=lambda: next(tokens))
    assert options.metadata() == (("authorization", "Bearer one"),)
    assert options.metadata() == (("authorization", "Bearer two"),)
    with pytest.raises(GatewayError, match="no token could be had") as caught:
        options.metadata()
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_the_callers_channel_options_win():
    options = ClientOptions(options=[("grpc.keepalive_time_ms", 5), ("grpc.x", "y")]).channel_options()
    assert [value for name, value in options if name == "grpc.keepalive_time_ms"] == [5]
    assert ("grpc.x", "y") in options


@pytest.mark.parametrize(
    "wrong", [{"timeout": 0}, {"timeout": float("inf")}, {"timeout": float("nan")}, {"max_message_bytes": 10}]
)
def test_options_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ClientOptions(**wrong).check("127.0.0.1:1")


@pytest.mark.parametrize("wrong", [{"initial": 0}, {"initial": 3.0}, {"multiplier": 0.5}, {"breaks": -1}])
def test_a_retry_policy_out_of_range_is_named(wrong):
    with pytest.raises(ValueError, match="expected 0 < initial <= maximum"):
        RetryPolicy(**wrong)


@given(attempt=st.integers(1, 10_000), retry_after=st.none() | st.floats(0, 100))
def test_a_wait_grows_to_the_maximum_and_never_undercuts_the_gateway(attempt, retry_after):
    policy = RetryPolicy(initial=0.1, multiplier=3, maximum=5)
    error = GatewayError(grpc.StatusCode.UNAVAILABLE, "", retry_after=retry_after)
    full = min(5, 0.1 * 3 ** min(attempt - 1, 30))
    delay = policy.delay(attempt, error)
    assert max(full / 2, retry_after or 0) <= delay <= max(full, retry_after or 0)


@pytest.mark.parametrize(
    ("code", "breaks", "repeats"),
    [
        ("UNAVAILABLE", 1000, True),
        ("INTERNAL", 5, True),
        ("INTERNAL", 6, False),
        ("CANCELLED", 1, True),
        ("UNAUTHENTICATED", 1, False),
        ("UNIMPLEMENTED", 1, False),
        ("RESOURCE_EXHAUSTED", 1, False),
    ],
)
def test_which_broken_streams_are_worth_another(code, breaks, repeats):
    assert repeats_stream(GatewayError(grpc.StatusCode[code], ""), breaks, RetryPolicy()) is repeats
