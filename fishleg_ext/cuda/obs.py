"""Launches csrc/obs.cu."""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.cuda import supports_block_size, supports_device
from fishleg_ext.reference.batches import block_slices

PANEL = 64  # steps between two matrix products
MOST_LEFT = 0.75  # the share of weights that are pending when these are gathered


class Rules(NamedTuple):
    """Say which weights may be eliminated, as of `obs_eliminate`; `stop` is inf where there is none."""

    group: int
    n: int
    m: int
    stop: float


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
    weight, inverse, alive = weight.to(dtype).contiguous(), _inverse(inverse, dtype), alive.contiguous()
    rules, size = Rules(group, n, m, torch.inf if stop is None else stop), weight.shape[1]
    if size <= largest_to_eliminate(dtype, group):
        return _eliminate(weight, inverse, alive, rules, dead_first, own=False)
    rank = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    cost = torch.empty_like(weight)
    # Of the inverse, and of what is gathered from it, again and again.
    workspace = round(size * size * dtype.itemsize / (1 - MOST_LEFT**2))
    for part in block_slices(len(weight), workspace, weight.device):
        block = inverse if len(inverse) == 1 else inverse[part]
        rank[part], cost[part] = _eliminate(weight[part], block, alive[part], rules, dead_first, own=False)
    return rank, cost


def _eliminate(
    weight: Tensor, inverse: Tensor, alive: Tensor, rules: Rules, dead_first: bool, own: bool
) -> tuple[Tensor, Tensor]:
    """Eliminate in registers where a block fits, else in panels; with `own` the inverses may be written."""
    if weight.shape[1] > largest_to_eliminate(weight.dtype, rules.group):
        return _eliminate_in_panels(weight, inverse, alive, rules, dead_first, own)
    rank = torch.empty(weight.shape, dtype=torch.int32, device=weight.device)
    cost = torch.empty_like(weight)
    if weight.numel():
        torch.ops.fishleg_ext_cuda.obs_eliminate_out(weight, inverse, alive, *rules, dead_first, rank, cost)
    return rank, cost


def _eliminate_in_panels(
    weight: Tensor, inverse: Tensor, alive: Tensor, rules: Rules, dead_first: bool, own: bool
) -> tuple[Tensor, Tensor]:
    """Take some steps of every block in one launch, then update all inverses in one matrix product.

    Once a quarter of the weights is eliminated, rows and columns of those that are pending are gathered from the
    inverses, and all starts again with these.
    """
    (blocks, size), group = weight.shape, rules.group
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
    subtracted = True  # whether `columns` have been subtracted from `inverse`
    for dead in (True, False) if dead_first else (False,):
        steps = int((alive != dead).sum(1).max())
        for done in range(0, steps, PANEL):
            if not dead and (index := _pending_indices(pending, steps - done, rules)) is not None:
                rest = _gathered(inverse, index)
                if not subtracted:
                    part = columns.gather(2, index[:, None].expand(-1, columns.shape[1], -1))
                    rest.baddbmm_(part.mT, part, alpha=-1)
                waiting, before = pending.gather(1, index), following[:, None]
                ranks, costs = _eliminate(weight.gather(1, index), rest, waiting, rules, dead_first=False, own=True)
                eliminated = waiting & (ranks < index.shape[1])
                rank.scatter_(1, index, torch.where(eliminated, before + ranks, rank.gather(1, index)))
                cost.scatter_(1, index, torch.where(eliminated, costs, cost.gather(1, index)))
                return rank, cost
            if not subtracted:
                out = inverse if own else weight.new_empty(blocks, size, size)
                inverse = torch.baddbmm(inverse.expand(blocks, -1, -1), columns.mT, columns, alpha=-1, out=out)
                own = True
            torch.ops.fishleg_ext_cuda.obs_eliminate_panel_out(
                inverse,
                alive,
                *rules,
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
            subtracted = False
            if rules.stop < torch.inf and not dead and bool((following < done + PANEL).all()):
                break  # nothing is below `stop` any more
    return rank, cost


def _pending_indices(pending: Tensor, expected: int, rules: Rules) -> Tensor | None:
    """Find the weights of each block that may yet be eliminated, in whole groups.

    Args:
        pending: [K, B], whether a weight is not eliminated yet.
        expected: how many of a block are pending if each step so far has eliminated a weight, else there are more.
        rules: of the elimination.

    Returns:
        indices [K, L] of those of each block, in order, then of others where it has fewer than another block; None
        where they are so many that to gather them is not worth it.
    """
    unit, worth_it = max(rules.group, rules.m), MOST_LEFT * pending.shape[1]
    if unit == 1 and expected > worth_it:
        return None  # without reading from the GPU
    eligible = pending.unflatten(1, (-1, unit)).sum(2) > rules.n  # a group of m that has lost m - n is closed
    count = int(eligible.sum(1).max()) * unit
    if count > worth_it:
        return None
    units = eligible.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : count // unit]
    return (units[..., None] * unit + torch.arange(unit, device=units.device)).flatten(1)


def _gathered(inverse: Tensor, index: Tensor) -> Tensor:
    """Rows and columns `index` [K, L] of inverses [K or 1, B, B] -> [K, L, L]."""
    (blocks, count), size = index.shape, inverse.shape[1]
    rows = inverse.expand(blocks, -1, -1).gather(1, index[:, :, None].expand(-1, -1, size))
    return rows.gather(2, index[:, None].expand(-1, count, -1))


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
