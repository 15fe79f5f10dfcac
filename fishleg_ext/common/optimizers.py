"""Hooks into optimizers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from fishleg_ext.common.arguments import checked_type


@dataclass(frozen=True)
class Handles:
    """Several hooks that are removed together."""

    handles: "Sequence[RemovableHandle | Handles]"

    def remove(self) -> None:
        """Remove them."""
        for handle in self.handles:
            handle.remove()


def after_each_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[torch.nn.Parameter],
    function: Callable[..., None],
) -> RemovableHandle:
    """Call a function of the optimizer after each of its steps.

    Args:
        optimizer: of some of the parameters at least; or what wraps one, as accelerate does.
        parameters: that the function changes.
        function: (optimizer, ...) -> None.

    Raises:
        ValueError: it is an optimizer of none of the parameters.
        TypeError: it is no optimizer.
    """
    checked_type("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
    owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in owned for parameter in parameters):
        raise ValueError(
            "expected an optimizer of the compressed parameters, got one of none of them; was the model copied, or its "
            "parameters replaced, after the optimizer was made?"
        )
    inner: Any = optimizer
    while not hasattr(inner, "_optimizer_step_post_hooks"):
        # A wrapper that is no optimizer of PyTorch but in name, such as accelerate's: it steps the one inside.
        wrapped = getattr(inner, "optimizer", None)
        if not isinstance(wrapped, torch.optim.Optimizer):
            raise TypeError(f"expected an optimizer with hooks, got {type(inner).__name__}; attach to the one it wraps")
        inner = wrapped
    return inner.register_step_post_hook(function)
