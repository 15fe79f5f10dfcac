"""Exact greedy elimination in panels of batched PyTorch: what grows with B^3 is done by matrix products."""

from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.reference.batches import block_slices
from fishleg_ext.reference.obs import joint_cost

PANEL = 16


def supports_obs_eliminate(*arguments: Any, **options: Any) -> tuple[bool, str]:
    """Every argument is taken, on any device."""
    return True, ""


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
    """Eliminate some blocks at a time, so that memory is bounded; see `ops.obs_eliminate`."""
    num_blocks, size = weight.shape
    dtype = widened(inverse.dtype)
    rank = torch.empty(num_blocks, size, dtype=torch.int32, device=weight.device)
    cost = torch.empty(num_blocks, size, dtype=dtype, device=weight.device)
    for part in block_slices(num_blocks, 2 * size * size * dtype.itemsize, weight.device):
        block = inverse if len(inverse) == 1 else inverse[part]
        elimination = _Elimination(weight[part], block.to(dtype), alive[part], group)
        if dead_first:
            elimination.condition_on_dead()
        rank[part], cost[part] = elimination.run(n, m, torch.inf if stop is None else stop)
    return rank, cost


class _Elimination:
    """Pivoted Cholesky factorisation of the inverses H of k blocks, in panels.

    Each elimination appends one column u to `columns`; what is left of the inverse is H = inverse - columns^T columns,
    of which only the chosen column and the diagonal are computed. When there are PANEL columns they are subtracted, in
    one matrix product. So a step reads a row of the inverse and a few columns that stay in cache, and what grows with
    B^3 is done at the speed of matrix products. The inverse that was given is never written to, and not copied before
    the first panel is full.

    Rows and columns of what was eliminated are left as they are: their entries, zero but for rounding, reach no others.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, alive: Tensor, group: int) -> None:
        k, size = weight.shape
        self.size, self.group = size, group
        self.alive = alive
        self.inverse, self.own = inverse, False
        self.weight = torch.where(alive, weight.to(inverse.dtype), 0)
        # The group x group blocks on the diagonal of H, [k, size / group, group, group].
        tiles = inverse.unflatten(2, (-1, group)).unflatten(1, (-1, group))  # [k or 1, G, g, G, g]
        tiles = tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        self.diagonal = tiles.expand(k, -1, -1, -1).clone()
        self.columns = inverse.new_empty(k, PANEL, size)
        self.num_columns = 0
        self.blocks = torch.arange(k if len(inverse) > 1 else 1, device=weight.device)

    def condition_on_dead(self) -> None:
        """Eliminate the dead, which moves nothing."""
        num_dead = (~self.alive).sum(1, keepdim=True)
        order = self.alive.to(torch.uint8).argsort(dim=1, stable=True)
        for step in range(int(num_dead.max()) if len(num_dead) else 0):
            self._eliminate(order[:, step : step + 1], num_dead > step)

    def run(self, n: int, m: int, stop: float) -> tuple[Tensor, Tensor]:
        """Eliminate the cheapest group of every block, again and again; rank and cost."""
        pending = self.alive.clone()
        running = torch.ones_like(self.alive[:, :1])  # [k, 1]
        # In the order of elimination: which weight, or `size` where there is none, and its cost.
        pivots, costs = [self.alive.new_empty(len(running), 0, dtype=torch.int64)], [self.weight[:, :0]]
        groups = pending.unflatten(1, (-1, self.group)).any(2).sum(1)
        for _ in range(int(groups.max()) if len(groups) else 0):
            cost, chosen = self._cheapest_group(pending, n, m)
            running = running & (cost <= stop) & (cost < torch.inf)
            if not running.any():
                break
            if self.group > 1:
                cost = cost / pending.unflatten(1, (-1, self.group)).sum(2).gather(1, chosen)
            for member in range(self.group):
                pivot = chosen * self.group + member  # [k, 1]
                valid = running & pending.gather(1, pivot)
                pivots.append(torch.where(valid, pivot, self.size))
                costs.append(cost)
                self._eliminate(pivot, valid)
                pending.scatter_(1, pivot, False)
        pivot = torch.cat(pivots, 1)
        # One column more, for what is not eliminated.
        rank = torch.where(self.alive, self.size, -1).to(torch.int32)
        rank = torch.nn.functional.pad(rank, (0, 1))
        rank.scatter_(1, pivot, (pivot < self.size).cumsum(1, dtype=torch.int32) - 1)
        cost = torch.full_like(rank, torch.inf, dtype=self.weight.dtype).scatter_(1, pivot, torch.cat(costs, 1))
        return rank[:, : self.size], cost[:, : self.size]

    def _cheapest_group(self, pending: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
        """Return joint cost and index, both [k, 1], of the open group that is cheapest; infinite if none is open."""
        if m:  # a group of m that has lost m - n is closed
            tuples = pending.unflatten(1, (-1, m))
            pending = (tuples & (tuples.sum(2, keepdim=True) > n)).flatten(1)
        if self.group == 1:
            variance = self.diagonal[..., 0, 0]
            cost = self.weight.square() / (2 * variance)
            usable = pending & (variance > 0)
        else:
            pending = pending.unflatten(1, (-1, self.group))  # [k, G, g]
            cost = joint_cost(self.weight.unflatten(1, (-1, self.group)), self.diagonal, pending)
            usable = pending.any(-1)
        cost = torch.where(usable & (cost < torch.inf), cost, torch.inf)  # NaN is never the cheapest
        return torch.min(cost, dim=1, keepdim=True)  # of ties the first

    def _eliminate(self, pivot: Tensor, valid: Tensor) -> None:
        """Remove weight `pivot` [k, 1] from the blocks in which `valid` [k, 1]."""
        if self.num_columns == PANEL:
            self._subtract_columns()
        column = self.inverse[self.blocks, pivot[:, 0]]  # symmetric: the row is the column
        if self.num_columns:
            done = self.columns[:, : self.num_columns]
            factors = done.gather(2, pivot[:, None].expand(-1, self.num_columns, -1)).mT
            column = torch.baddbmm(column[:, None], factors, done, alpha=-1)[:, 0]
        variance = column.gather(1, pivot)
        valid = valid & (variance > 0)  # a weight that nothing compensates moves no other
        root = torch.where(valid, variance, 1).sqrt()
        column = torch.where(valid, column / root, 0)
        self.columns[:, self.num_columns] = column
        self.num_columns += 1
        # Masked twice: an invalid pivot may be dead, and hold anything.
        self.weight -= column * torch.where(valid, self.weight.gather(1, pivot) / root, 0)
        tiles = column.unflatten(1, (-1, self.group))
        self.diagonal -= tiles[..., None] * tiles[..., None, :]

    def _subtract_columns(self) -> None:
        """Begin a new panel."""
        inverse = self.inverse.expand(len(self.columns), -1, -1)
        out = inverse if self.own else torch.empty_like(inverse, memory_format=torch.contiguous_format)
        self.inverse = torch.baddbmm(inverse, self.columns.mT, self.columns, alpha=-1, out=out)
        self.blocks = torch.arange(len(out), device=out.device)
        self.own, self.num_columns = True, 0
