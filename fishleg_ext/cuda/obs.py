"""Launches csrc/obs.cu."""

from typing import Any

import torch
from torch import Tensor

from fishleg_ext.cuda import shared_bytes_per_block, supports_device
from fishleg_ext.dtypes import widened


def supports_obs_eliminate(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    group: int = 1,
    **options: Any,
) -> tuple[bool, str]:
    """Blocks that fit into the shared memory which the device gives a thread block; single weights."""
    supported, reason = supports_device(weight)
    if not supported:
        return False, reason
    if group > 1:
        return False, f"its CUDA C++ kernel removes single weights, not groups of {group}"
    size, dtype = weight.shape[1], widened(inverse.dtype)
    needed = torch.ops.fishleg_ext_cuda.obs_eliminate_shared_bytes(size, dtype.itemsize)
    room = shared_bytes_per_block(weight.device)
    return needed <= room, (
        f"its CUDA C++ kernel holds a block in shared memory: {size} weights in {dtype} take {needed} bytes, "
        f"and {weight.device} has {room}"
    )


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
    """One thread block for each block of weights; an inverse that all share is not copied."""
    dtype = widened(inverse.dtype)
    rank = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    cost = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel() == 0:
        return rank, cost
    if inverse.stride(0) == 0:
        inverse = inverse[:1]
    torch.ops.fishleg_ext_cuda.obs_eliminate_out(
        weight.to(dtype).contiguous(),
        inverse.to(dtype).contiguous(),
        alive.contiguous(),
        n,
        m,
        torch.inf if stop is None else stop,
        dead_first,
        rank,
        cost,
    )
    return rank, cost
