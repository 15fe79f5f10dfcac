"""Launches csrc/obs.cu."""

from typing import Any

import torch
from torch import Tensor

from fishleg_ext.cuda import supports_block_size, supports_device
from fishleg_ext.dtypes import widened


def supports_obs_eliminate(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    group: int = 1,
    **options: Any,
) -> tuple[bool, str]:
    """Blocks that fit into registers; single weights."""
    supported, reason = supports_device(weight)
    if not supported:
        return False, reason
    if group > 1:
        return False, f"its CUDA C++ kernel removes single weights, not groups of {group}"
    return supports_block_size(weight.shape[1], widened(inverse.dtype))


def obs_eliminate(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    group: int = 1,
    n: int = 0,
    m: int = 0,
    stop: float | None = None,
    dead_first: bool = False,
) -> tuple[Tensor, Tensor]:
    """A few warps, or one, for each block of weights."""
    dtype = widened(inverse.dtype)
    rank = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    cost = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel():
        torch.ops.fishleg_ext_cuda.obs_eliminate_out(
            weight.to(dtype).contiguous(),
            _inverse(inverse, dtype),
            alive.contiguous(),
            n,
            m,
            torch.inf if stop is None else stop,
            dead_first,
            rank,
            cost,
        )
    return rank, cost


def supports_obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> tuple[bool, str]:
    """Blocks that fit into registers."""
    supported, reason = supports_device(weight)
    return supports_block_size(weight.shape[1], widened(weight.dtype, inverse.dtype)) if supported else (False, reason)


def obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """A few warps, or one, for each block of weights."""
    dtype = widened(weight.dtype, inverse.dtype)
    moved = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel():
        torch.ops.fishleg_ext_cuda.obs_compensate_out(
            weight.to(dtype).contiguous(), _inverse(inverse, dtype), pruned.contiguous(), moved
        )
    return moved.to(weight.dtype)


def _inverse(inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """As the kernels read it; one that all blocks share is not copied for each."""
    return (inverse[:1] if inverse.stride(0) == 0 else inverse).to(dtype).contiguous()
