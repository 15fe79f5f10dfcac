"""States that are saved, and parameters that are put back."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch


def state_entry(state: Mapping[str, Any], key: str, of: str) -> Any:
    """Return an entry of the state of something, or raise ValueError if it is that of something else."""
    if key not in state:
        raise ValueError(f"expected the state of {of} with {key!r}, got {sorted(map(str, state))}")
    return state[key]


def of_today(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the state of a Pruner as versions before 0.2 wrote it, in today's layout."""
    if "held" not in state:
        return state
    of_estimate = ("held", "used_grads", "masks_at_estimate", "model", "curvature")
    rest = {key: value for key, value in state.items() if key not in (*of_estimate, "uses")}
    estimate = {key: state[key] for key in of_estimate if key in state}
    return {**rest, "estimate": estimate, "flops_per_weight": state.get("uses", {})}


class Restorer:
    """Puts parameters back as they were should anything be raised within a block; keeps one copy of them meanwhile."""

    def __init__(self) -> None:
        self.active = False

    @contextlib.contextmanager
    def __call__(self, parameters: Iterable[torch.nn.Parameter]) -> Iterator[None]:
        """Restore these within this block, unless an outer one does."""
        if self.active:
            yield
            return
        before = [(parameter, parameter.detach().clone()) for parameter in parameters]
        self.active = True
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for parameter, value in before:
                    parameter.copy_(value)
            raise
        finally:
            self.active = False
