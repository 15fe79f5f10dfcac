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


def eliminate_(weight: Tensor, inverse: Tensor, index: Tensor, valid: Tensor, target: Tensor | float = 0.0) -> None:
    """Set weight q = `index` [K] of blocks to its target t [K], in place, and eliminate it.

    w -= H[:, q] (w_q - t) / H_qq, H -= H[:, q] H[q, :] / H_qq, only where `valid` [K]; a weight whose H_qq is not
    positive moves no other. Pruning has the target zero.
    """
    blocks = torch.arange(len(index), device=index.device)
    column = inverse[blocks, :, index]  # [K, B]
    variance = column[blocks, index]
    valid = valid & (variance > 0)
    variance = torch.where(valid, variance, 1)
    column = torch.where(valid[:, None], column, 0)  # what is not valid may hold anything
    weight -= column * (torch.where(valid, weight[blocks, index] - target, 0) / variance)[:, None]
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


def obs_quantize(
    weight: Tensor,
    inverse: Tensor,
    alive: Tensor,
    codebook: Tensor,
    *,
    order: str = "cheapest",
    num_free: int = 0,
    dead_first: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Set one weight of every block to its code, again and again; weights and inverses H of what is left follow."""
    dtype, (num_blocks, size) = widened(inverse.dtype), weight.shape
    code = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    cost = torch.zeros(weight.shape, dtype=dtype, device=weight.device)
    result = torch.zeros_like(cost)
    free = torch.arange(size, device=weight.device) >= size - num_free
    for part in block_slices(num_blocks, 2 * size * size * dtype.itemsize, weight.device):
        codes = Codes(codebook if len(codebook) == 1 else codebook[part], dtype, num_free)
        coded, in_order = alive[part] & ~free, order == "given"
        moving = torch.ones_like(coded) if in_order else coded | free  # what compensates
        h = (inverse if len(inverse) == 1 else inverse[part]).to(dtype).expand(len(coded), -1, -1).clone()
        w = torch.where(moving, weight[part].to(dtype), 0)
        for q in range(size) if dead_first and not in_order else ():
            eliminate_(torch.zeros_like(w), h, torch.full_like(code[part, 0], q, dtype=torch.int64), ~moving[:, q])
        h.masked_fill_(~(moving[:, :, None] & moving[:, None, :]), 0)
        pending = moving & ~free
        cost[part] = torch.where(pending, torch.inf, 0)
        blocks = torch.arange(len(w), device=w.device)
        for step in range(size - num_free):
            nearest, value, beyond = codes.nearest(w)
            target = torch.where(coded, value, 0)
            if in_order:
                index = torch.full_like(blocks, step)
            else:
                index = next_to_code(w - target, h.diagonal(dim1=1, dim2=2), pending, beyond)
            variance = h[blocks, index, index]
            valid = pending[blocks, index] & (variance > 0)
            if not valid.any():
                continue
            aim = target[blocks, index]
            spent = (w[blocks, index] - aim).square() / (2 * variance)
            cost[part] = _put(cost[part], index, valid, spent)
            code[part] = _put(code[part], index, valid & coded[blocks, index], nearest[blocks, index])
            eliminate_(w, h, index, valid, aim)
            result[part] = _put(result[part], index, valid, aim)
            pending = _put(pending, index, valid, torch.zeros_like(valid))
        nearest, value, _ = codes.nearest(w)  # what nothing compensates
        code[part] = torch.where(pending & coded, nearest, code[part])
        result[part] = torch.where(free, w, torch.where(pending & coded, value, result[part]))
    return code, cost, result


def next_to_code(move: Tensor, variance: Tensor, pending: Tensor, beyond: Tensor) -> Tensor:
    """Return the index [K] of the cheapest weight, of those beyond the codes where there are any; of ties the first.

    Args:
        move: what each weight is off its code, [K, B].
        variance: the diagonal of H, [K, B].
        pending: bool [K, B].
        beyond: bool [K, B].
    """
    cost = torch.where(pending & (variance > 0), move.square() / (2 * variance), torch.inf)
    cost = torch.where(cost < torch.inf, cost, torch.inf)  # NaN is never the cheapest
    first = torch.where(beyond, cost, torch.inf)
    return torch.where((first < torch.inf).any(1), first.argmin(1), cost.argmin(1))


def _put(tensor: Tensor, index: Tensor, where: Tensor, values: Tensor) -> Tensor:
    """Replace one entry of each row of [K, B], in the rows `where` [K]."""
    here = torch.arange(tensor.shape[1], device=tensor.device) == index[:, None]
    return torch.where(here & where[:, None], values[:, None].to(tensor.dtype), tensor)


class Codes:
    """Looks up the nearest codes of blocks of weights.

    Args:
        codebook: [K or 1, S, C]; see `ops.obs_quantize`.
        dtype: of the weights.
        num_free: weights without codes at the end of each block.
    """

    def __init__(self, codebook: Tensor, dtype: torch.dtype, num_free: int) -> None:
        self.values, self.num_free = codebook.to(dtype), num_free
        self.shared = codebook.shape[0] == codebook.shape[1] == 1
        lower, upper = self.values[..., :-1], self.values[..., 1:]
        self.boundaries = ((lower + upper) / 2).contiguous()  # [K or 1, S, C - 1]; inf where there are fewer codes
        # Beyond the outermost codes by half the step there.
        count = self.values.isfinite().sum(2, keepdim=True)
        last = (count - 1).clamp(min=0)
        steps = torch.nn.functional.pad(upper - lower, (0, 1), value=torch.inf)
        self.lowest = self.values[..., :1] - torch.where(count > 1, steps[..., :1], torch.inf) / 2
        before = steps.gather(2, (last - 1).clamp(min=0))
        self.highest = self.values.gather(2, last) + torch.where(count > 1, before, torch.inf) / 2

    def nearest(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return code (int64), value and whether it lies beyond all codes, each [K, B]; of ties the lower code.

        0 where there are no codes, and for NaN the first.
        """
        coded = weight[:, : weight.shape[1] - self.num_free].unflatten(1, (self.values.shape[1], -1))  # [K, S, n]
        if self.shared:
            code = torch.searchsorted(self.boundaries[0, 0], coded.contiguous())
            code = torch.where(coded.isnan(), 0, code)
            value = self.values[0, 0][code]
        else:
            boundaries = self.boundaries.expand(len(weight), -1, -1).contiguous()
            code = torch.where(coded.isnan(), 0, torch.searchsorted(boundaries, coded.contiguous()))
            value = self.values.expand(len(weight), -1, -1).gather(2, code)
        beyond = (coded < self.lowest) | (coded > self.highest)
        pad = lambda x: torch.nn.functional.pad(x.flatten(1), (0, self.num_free))
        return pad(code), pad(value), pad(beyond)

    def nearest_of_column(self, weight: Tensor, column: int, size: int) -> tuple[Tensor, Tensor]:
        """Return code and value of one weight of each block, [K], column `column` of `size`."""
        segment = column // max(1, (size - self.num_free) // self.values.shape[1])
        boundaries = self.boundaries[:, segment].expand(len(weight), -1).contiguous()
        code = torch.searchsorted(boundaries, weight[:, None].contiguous())
        code = torch.where(weight[:, None].isnan(), 0, code)
        return code[:, 0], self.values[:, segment].expand(len(weight), -1).gather(1, code)[:, 0]
