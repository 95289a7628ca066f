"""What messages are made of and made into where gRPC meets them."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Form(NamedTuple):
    """What a method's messages are made of, and made into.

    Attributes:
        parse: Makes a request of its bytes.
        serialize: Makes bytes of a response; None where it is bytes.
    """

    parse: Callable[[bytes], Any] | None
    serialize: Callable[[Any], bytes] | None
