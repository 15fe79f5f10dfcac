"""Checks of arguments: each takes a name and a value, and returns the value in its plain type or raises."""

import numbers
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def checked_type(name: str, value: T, kind: type, what: str) -> T:
    """Return `value` if it is of this kind."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} to be {what}, got {value!r:.200}")
    return value


def checked_function(name: str, value: T, what: str) -> T:
    """Return `value` if it can be called."""
    if not callable(value):
        raise TypeError(f"expected {name} to be {what}, got {value!r:.200}")
    return value


def checked_integer(name: str, value: Any, least: int = 0) -> int:
    """Return `value` as an int if it is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"expected {name} to be an integer >= {least}, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}")
    return int(value)


def checked_count(name: str, value: Any) -> int:
    """Return `value` as an int if it is an integer >= 1."""
    return checked_integer(name, value, 1)


def checked_damping(name: str, value: Any) -> float:
    """Return `value` as a float if it is finite and not negative."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, got {value!r}")
    if not 0 <= float(value) < float("inf"):
        raise ValueError(f"expected {name} to be finite and >= 0, got {value}")
    return float(value)


def checked_positive(name: str, value: Any) -> float:
    """Return `value` as a float if it is finite and positive."""
    if (checked := checked_damping(name, value)) == 0:
        raise ValueError(f"expected {name} to be finite and > 0, got {value}")
    return checked


def checked_sparsity(name: str, value: Any) -> float:
    """Return `value` as a float if it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number in [0, 1), got {value!r}")
    if not 0 <= float(value) < 1:
        raise ValueError(f"expected {name} in [0, 1), got {value}")
    return float(value)


def checked_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool if it is one, or 0 or 1."""
    if not isinstance(value, int) or value not in (0, 1):
        raise TypeError(f"expected {name} to be a bool, got {value!r:.200}")
    return bool(value)


def one_of(*choices: str) -> Callable[[str, Any], str]:
    """Make the check that a value is one of these strings."""

    def checked(name: str, value: Any) -> str:
        if value not in choices:
            listed = " or ".join([", ".join(map(repr, choices[:-1])), repr(choices[-1])])
            raise ValueError(f"expected {name} to be {listed}, got {value!r}")
        return value

    return checked
