"""Checks of what users give: it, numbers in their plain type, or an error that says what was expected."""

import numbers
from typing import Any, TypeVar

T = TypeVar("T")


def checked_type(name: str, value: T, kind: type, what: str) -> T:
    """`value` if it is of this kind."""
    if not isinstance(value, kind):
        raise TypeError(f"expected {name} to be {what}, got {value!r:.200}")
    return value


def checked_function(name: str, value: T, what: str) -> T:
    """`value` if it can be called."""
    if not callable(value):
        raise TypeError(f"expected {name} to be {what}, got {value!r:.200}")
    return value


def checked_count(name: str, count: Any) -> int:
    """`count` if it is an integer >= 1."""
    if isinstance(count, bool) or not isinstance(count, numbers.Integral):
        raise TypeError(f"expected {name} to be an integer >= 1, got {count!r}")
    if count < 1:
        raise ValueError(f"expected {name} >= 1, got {count}")
    return int(count)


def checked_damping(damping: float, *, positive: bool) -> float:
    """`damping` if it is finite and not negative, or positive if it must be."""
    if isinstance(damping, bool) or not isinstance(damping, numbers.Real):
        raise TypeError(f"expected damping to be a number, got {damping!r}")
    damping = float(damping)
    if not 0 <= damping < float("inf") or (positive and damping == 0):
        raise ValueError(f"expected damping to be finite and {'>' if positive else '>='} 0, got {damping}")
    return damping


def checked_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """`sparsity`, or another fraction that is named, if it is in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, numbers.Real):
        raise TypeError(f"expected {name} to be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected {name} in [0, 1), got {sparsity}")
    return float(sparsity)
