"""Launches csrc/obs.cu."""

import functools
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.cuda import supports_block_size, supports_device
from fishleg_ext.reference.batches import block_slices

PANEL = 64  # steps between two matrix products


def supports_obs_eliminate(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    *,
    group: int = 1,
    **options: Any,
) -> tuple[bool, str]:
    """Single weights and groups of 4."""
    supported, reason = supports_device(weight)
    if supported and not largest_to_eliminate(widened(inverse.dtype), group):
        return False, f"its CUDA C++ kernel removes single weights or groups of 4, not groups of {group}"
    return supported, reason


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
    """A few warps, or one, for each block of weights that fits into registers; larger ones in panels."""
    dtype = widened(inverse.dtype)
    rank = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    cost = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    if weight.numel() == 0:
        return rank, cost
    weight, inverse, alive = weight.to(dtype).contiguous(), _inverse(inverse, dtype), alive.contiguous()
    options = (group, n, m, torch.inf if stop is None else stop, dead_first)
    if weight.shape[1] <= largest_to_eliminate(dtype, group):
        torch.ops.fishleg_ext_cuda.obs_eliminate_out(weight, inverse, alive, *options, rank, cost)
    else:
        size = weight.shape[1]
        for part in block_slices(len(weight), size * size * dtype.itemsize, weight.device):
            block = inverse if len(inverse) == 1 else inverse[part]
            rank[part], cost[part] = _eliminate_in_panels(weight[part], block, alive[part], *options)
    return rank, cost


def _eliminate_in_panels(
    weight: Tensor, inverse: Tensor, alive: Tensor, group: int, n: int, m: int, stop: float, dead_first: bool
) -> tuple[Tensor, Tensor]:
    """Take some steps of every block in one launch, then update all inverses in one matrix product."""
    blocks, size = weight.shape
    zero = weight.new_zeros(())
    # The group x group blocks on the diagonal, [K, B, group].
    tiles = inverse.unflatten(2, (-1, group)).unflatten(1, (-1, group)).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    members = alive.unflatten(1, (-1, group))
    read = members[..., None] & members[..., None, :] | dead_first
    variance = torch.where(read, tiles, zero).reshape(blocks, size, group)
    weight, pending = torch.where(alive, weight, zero), alive.clone()
    rank = torch.where(alive, size, -1).to(torch.int32)
    cost = torch.full_like(weight, torch.inf)
    following = torch.zeros(blocks, dtype=torch.int32, device=weight.device)
    columns = weight.new_empty(blocks, PANEL + group - 1, size)  # room for a group that begins within a panel
    own = False
    for dead in (True, False) if dead_first else (False,):
        steps = int((alive != dead).sum(1).max())
        for done in range(0, steps, PANEL):
            torch.ops.fishleg_ext_cuda.obs_eliminate_panel_out(
                inverse,
                alive,
                group,
                n,
                m,
                stop,
                dead_first,
                dead,
                weight,
                variance,
                pending,
                following,
                columns,
                rank,
                cost,
            )
            if stop < torch.inf and not dead and bool((following < done + PANEL).all()):
                break  # nothing is below `stop` any more
            if done + PANEL < steps or dead:
                out = inverse if own else weight.new_empty(blocks, size, size)
                inverse = torch.baddbmm(inverse.expand(blocks, -1, -1), columns.mT, columns, alpha=-1, out=out)
                own = True
    return rank, cost


@functools.cache
def largest_to_eliminate(dtype: torch.dtype, group: int) -> int:
    """The most weights in a block that is eliminated in registers; 0 where no kernel takes such groups."""
    return torch.ops.fishleg_ext_cuda.largest_to_eliminate(dtype.itemsize, group)


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
    """Return an inverse as the kernels read it; one that all blocks share is not copied for each."""
    return (inverse[:1] if inverse.stride(0) == 0 else inverse).to(dtype).contiguous()
