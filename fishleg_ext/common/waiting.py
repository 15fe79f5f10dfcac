"""Reads numbers of many tensors at once: each read waits for a GPU."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def read(numbers: Iterable[Tensor]) -> list[float]:
    """Return scalars as numbers, in float64: exact for whole ones."""
    held = [number.detach().double().reshape(()) for number in numbers]
    if not held:
        return []
    return torch.stack([number.to(held[0].device) for number in held]).tolist()


def read_by_name(numbers: Mapping[str, Tensor]) -> dict[str, float]:
    """Return scalars as numbers, by name."""
    return dict(zip(numbers, read(numbers.values()), strict=True))
