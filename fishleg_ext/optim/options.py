"""Checks what users set, and what comes of it."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.arguments import checked_damping, checked_type
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.fishleg_adam import Adam


def checked_adam(adam: Any, curvature: str) -> Adam:
    """Return Adam if it goes on without end and has no scale, as the optimizer's is to be."""
    checked_type("adam", adam, Adam, "an Adam")
    if curvature != "fishleg":
        raise ValueError(f"expected curvature='fishleg' with adam, got {curvature!r}")
    if adam.steps is not None or adam.scaled or adam.products != "gradients":
        raise ValueError(f"expected adam=Adam(steps=None, scaled=False, ...) without Gauss-Newton products, got {adam}")
    return adam


def check_alone() -> None:
    """Raise NotImplementedError in one of several processes of torch.distributed."""
    distributed = torch.distributed
    processes = distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1
    if processes > 1:
        raise NotImplementedError(
            f"FishLeg learns from the samples of one process, so that the models of {processes} would drift apart: "
            "expected to be alone, without torch.distributed"
        )


def check_finite(moved: Mapping[str, Tensor], numbers: Iterable[float] | None) -> None:
    """Raise ValueError where directions, which float16 may not hold, or what was measured of them is not finite."""
    half = {name: n for name, n in moved.items() if n.dtype == torch.float16}
    norms = read(torch._foreach_norm(list(half.values()), dtype=torch.float64)) if half else []
    bad = [name for name, norm in zip(half, norms, strict=True) if not math.isfinite(norm)]
    if bad or not all(map(math.isfinite, numbers or ())):
        raise ValueError(
            f"the step of {', '.join(bad) or 'some parameters'} overflows; use more damping, or parameters in float32"
        )


def checked_share(name: str, value: Any) -> float:
    """Return a number from 0 to below 1."""
    if not 0 <= (checked := checked_damping(name, value)) < 1:
        raise ValueError(f"expected {name} in [0, 1), got {value}")
    return checked


def checked_rate(name: str, value: Any) -> Any:
    """Return a learning rate as it is, which may be a tensor, if it is finite and not negative."""
    checked_damping(name, float(value) if isinstance(value, Tensor) else value)
    return value


# What a group of parameters may have of its own.
OPTIONS = {"lr": checked_rate, "momentum": checked_share, "weight_decay": checked_damping}
