"""What an option may be, checked where it is set, so that a bad one is refused before anything is trained."""

import math
from typing import Any


class ConfigError(ValueError):
    """An option is out of range; the text says which, what was expected and what came."""


def expect(holds: bool, name: str, expected: str, received: object) -> None:
    """Refuses an option.

    Raises:
        ConfigError: ``holds`` is false.
    """
    if not holds:
        raise ConfigError(f"{name} should be {expected}; received {received!r}")


def expect_integers(options: object, names: tuple[str, ...], least: int = 1) -> None:
    """Every named attribute is an integer of at least ``least``; True and 2.0 are none.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        value = getattr(options, name)
        expect(type(value) is int and value >= least, name, f"an integer of at least {least}", value)


def expect_order(options: object, low: str, high: str) -> None:
    """The attribute ``high`` is no smaller than ``low``.

    Raises:
        ConfigError: it is.
    """
    least, most = getattr(options, low), getattr(options, high)
    expect(most >= least, high, f"at least {low}, which is {least}", most)


def expect_shares(options: object, names: tuple[str, ...]) -> None:
    """Every named attribute is a number from 0 to 1.

    Raises:
        ConfigError: one is not.
    """
    for name in names:
        value = getattr(options, name)
        expect(is_number(value) and 0 <= value <= 1, name, "a number from 0 to 1", value)


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and not True or False."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
