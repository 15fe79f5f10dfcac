"""Optimal Brain Surgeon within blocks: scores, exact greedy elimination, exact joint compensation."""

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.reference.batches import block_slices
from fishleg_ext.reference.block_fisher import damped_cholesky


def obs_score(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """Return the cost of pruning each weight alone."""
    inverse_diagonal = inverse_diagonal.to(widened(inverse_diagonal.dtype))
    weight = weight.to(inverse_diagonal.dtype)
    return (weight * weight / (2 * inverse_diagonal)).contiguous()


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
    """Eliminate the cheapest group of every block, again and again; weights and inverses H of what is left follow."""
    dtype, (num_blocks, size) = widened(inverse.dtype), weight.shape
    rank = torch.where(alive, size, -1).to(torch.int32)
    cost = torch.full_like(rank, torch.inf, dtype=dtype)
    group_of = torch.arange(size, device=weight.device) // group
    limit = torch.inf if stop is None else stop
    for part in block_slices(num_blocks, 2 * size * size * dtype.itemsize, weight.device):
        pending = alive[part].clone()
        h = (inverse if len(inverse) == 1 else inverse[part]).to(dtype).expand(len(pending), -1, -1).clone()
        w = torch.where(pending, weight[part].to(dtype), 0)
        for q in range(size) if dead_first else ():
            eliminate_(torch.zeros_like(w), h, torch.full_like(rank[part, 0], q, dtype=torch.int64), ~pending[:, q])
        h.masked_fill_(~(pending[:, :, None] & pending[:, None, :]), 0)
        done = torch.zeros_like(rank[part, :1])
        for _ in range(size // group):
            joint = group_costs(w, h, pending, group, n, m)
            best, chosen = joint.min(1, keepdim=True)  # of ties the first
            members = pending & (group_of == chosen) & (best <= limit) & (best < torch.inf)
            if not members.any():
                break
            rank[part] = torch.where(members, done + members.cumsum(1, dtype=torch.int32) - 1, rank[part])
            cost[part] = torch.where(members, best / members.sum(1, keepdim=True), cost[part])
            for q in range(group):
                index = chosen[:, 0] * group + q
                eliminate_(w, h, index, members.gather(1, index[:, None])[:, 0])
            pending &= ~members
            done += members.sum(1, keepdim=True, dtype=torch.int32)
    return rank, cost


def eliminate_(weight: Tensor, inverse: Tensor, index: Tensor, valid: Tensor) -> None:
    """Eliminate weight q = `index` [K] from blocks, in place: w -= H[:, q] w_q / H_qq, H -= H[:, q] H[q, :] / H_qq.

    Only where `valid` [K]; a weight whose H_qq is not positive moves no other.
    """
    blocks = torch.arange(len(index), device=index.device)
    column = inverse[blocks, :, index]  # [K, B]
    variance = column[blocks, index]
    valid = valid & (variance > 0)
    variance = torch.where(valid, variance, 1)
    column = torch.where(valid[:, None], column, 0)  # what is not valid may hold anything
    weight -= column * (torch.where(valid, weight[blocks, index], 0) / variance)[:, None]
    inverse -= column[:, :, None] * column[:, None, :] / variance[:, None, None]


def group_costs(weight: Tensor, inverse: Tensor, pending: Tensor, group: int, n: int, m: int) -> Tensor:
    """Joint cost of each group of each block, [K, B / group]; +inf where nothing is pending or may be eliminated."""
    if m:  # a group of m that has lost m - n is closed
        tuples = pending.unflatten(1, (-1, m))
        pending = (tuples & (tuples.sum(2, keepdim=True) > n)).flatten(1)
    if group == 1:
        variance = inverse.diagonal(dim1=1, dim2=2)
        cost = torch.where(variance > 0, weight.square() / (2 * variance), torch.inf)
    else:
        tiles = inverse.unflatten(2, (-1, group)).unflatten(1, (-1, group)).diagonal(dim1=1, dim2=3)
        mine = pending.unflatten(1, (-1, group))
        cost = joint_cost(weight.unflatten(1, (-1, group)), tiles.permute(0, 3, 1, 2), mine)
        pending = mine.any(2)
    return torch.where(pending & (cost < torch.inf), cost, torch.inf)  # NaN is never the cheapest


def joint_cost(weight: Tensor, inverse: Tensor, chosen: Tensor) -> Tensor:
    """Return 1/2 w^T H^-1 w of the chosen weights of each group, [..., g] and [..., g, g], eliminated in turn.

    Without square roots, so that equal groups have equal costs; infinite where H is not positive definite.
    """
    cost = weight.new_zeros(weight.shape[:-1])
    for i in range(weight.shape[-1]):
        mine, variance = chosen[..., i], inverse[..., 0, 0]
        alone = torch.where(variance > 0, weight[..., 0] * (weight[..., 0] / (2 * variance)), torch.inf)
        cost = torch.where(mine, cost + alone, cost)
        # What is not chosen may hold anything.
        column = torch.where(mine[..., None], inverse[..., 1:, 0], 0)
        factor = column * torch.where(mine, 1 / variance, 0)[..., None]
        weight = weight[..., 1:] - factor * torch.where(mine, weight[..., 0], 0)[..., None]
        inverse = inverse[..., 1:, 1:] - factor[..., None] * column[..., None, :]
    return cost


def obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """Solve for the joint update of each block through the rows and columns of the pruned."""
    dtype = widened(inverse.dtype)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    identity = torch.eye(weight.shape[1], dtype=dtype, device=weight.device)
    workspace = 4 * identity.numel() * identity.element_size()  # rows and columns of the pruned, damped, their factor
    for part in block_slices(len(weight), workspace, weight.device):
        block = (inverse if len(inverse) == 1 else inverse[part]).to(dtype)
        solved = pruned[part] & (block.diagonal(dim1=1, dim2=2) != 0)
        both = solved[:, :, None] & solved[:, None, :]
        factor, info = damped_cholesky(torch.where(both, block, identity), 0.0)
        rhs = torch.where(solved, weight[part].to(dtype), 0)[..., None]
        multiplier = torch.cholesky_solve(rhs, factor)  # [k, B, 1], zero outside the pruned
        multiplier[info < 0] = torch.nan
        moved = weight[part] - (block @ multiplier)[..., 0]  # in the wider of the two dtypes
        result[part] = torch.where(pruned[part], 0, moved).to(weight.dtype)
    return result
