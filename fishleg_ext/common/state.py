"""Entries of saved states."""

from collections.abc import Mapping
from typing import Any


def state_entry(state: Mapping[str, Any], key: str, of: str) -> Any:
    """Return an entry of the state of something, or raise ValueError if it is that of something else."""
    if key not in state:
        raise ValueError(f"expected the state of {of} with {key!r}, got {sorted(map(str, state))}")
    return state[key]
