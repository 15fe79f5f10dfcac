"""Optimal Brain Surgeon within blocks: scores, exact greedy elimination, exact joint compensation."""

import torch
from torch import Tensor

from fishleg_ext.dtypes import widened
from fishleg_ext.reference.batches import batches
from fishleg_ext.reference.block_fisher import damped_cholesky


def obs_score(weight: Tensor, inverse_diagonal: Tensor) -> Tensor:
    """The cost of losing each weight alone."""
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
    """A few blocks at a time, so that their columns stay in cache."""
    num_blocks, size = weight.shape
    rank = torch.empty(num_blocks, size, dtype=torch.int32, device=weight.device)
    cost = torch.empty(num_blocks, size, dtype=widened(inverse.dtype), device=weight.device)
    for part in batches(num_blocks, size * size * cost.element_size(), weight.device):
        elimination = _Elimination(
            weight[part],
            inverse if len(inverse) == 1 else inverse[part],
            alive[part],
            group,
            dead_first,
        )
        elimination.run(n, m, torch.inf if stop is None else stop)
        rank[part] = elimination.rank
        cost[part] = elimination.cost
    return rank, cost


class _Elimination:
    """Pivoted Cholesky factorisation of the inverses H of k blocks, left-looking.

    The inverse given, H0, is never changed. Each elimination appends one column u to `columns`; what is left of the
    inverse is H = H0 - columns^T columns, of which only the chosen column and the diagonal are ever computed. This
    moves a quarter of the bytes of updating H in place.
    """

    def __init__(self, weight: Tensor, inverse: Tensor, alive: Tensor, group: int, dead_first: bool) -> None:
        dtype = widened(inverse.dtype)
        k, size = weight.shape
        self.size, self.group = size, group
        self.alive = alive
        self.inverse = inverse
        # Not yet eliminated, and to be: everything else is neither read nor moved.
        self.pending = torch.ones_like(alive) if dead_first else alive.clone()
        self.weight = torch.where(alive, weight.to(dtype), 0)
        # The group x group blocks on the diagonal of H, [k, size / group, group, group].
        tiles = inverse.unflatten(2, (-1, group)).unflatten(1, (-1, group))  # [k or 1, G, g, G, g]
        tiles = tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
        self.diagonal = tiles.to(dtype).expand(k, -1, -1, -1).clone()
        self.columns = torch.empty(k, 0, size, dtype=dtype, device=weight.device)
        self.num_columns = 0
        self.rank = torch.where(alive, size, -1).to(torch.int32)
        self.cost = torch.full((k, size), torch.inf, dtype=dtype, device=weight.device)
        if dead_first:
            self._eliminate_dead()

    def run(self, n: int, m: int, stop: float) -> None:
        """Eliminate the cheapest group of every block, again and again."""
        running = torch.ones_like(self.alive[:, :1])  # [k, 1]
        next_rank = torch.zeros_like(self.rank[:, :1])
        groups = self.alive.unflatten(1, (-1, self.group)).any(2).sum(1)
        rounds = int(groups.max()) if len(groups) else 0
        self._reserve(rounds * self.group)
        for _ in range(rounds):
            cost, chosen = self._cheapest_group(n, m)
            running = running & (cost <= stop) & (cost < torch.inf)
            if not running.any():
                break
            members = self.pending.unflatten(1, (-1, self.group)).sum(2).gather(1, chosen)
            share = cost / members
            for member in range(self.group):
                pivot = chosen * self.group + member  # [k, 1]
                valid = running & self.pending.gather(1, pivot)
                self.rank.scatter_(1, pivot, torch.where(valid, next_rank, self.rank.gather(1, pivot)))
                self.cost.scatter_(1, pivot, torch.where(valid, share, self.cost.gather(1, pivot)))
                next_rank = next_rank + valid
                self._eliminate(pivot, valid)

    def _cheapest_group(self, n: int, m: int) -> tuple[Tensor, Tensor]:
        """Joint cost and index, both [k, 1], of the open group that is cheapest; infinite if none is open."""
        pending = self.pending
        if m:  # a group of m that has lost m - n is closed
            tuples = pending.unflatten(1, (-1, m))
            pending = (tuples & (tuples.sum(2, keepdim=True) > n)).flatten(1)
        pending = pending.unflatten(1, (-1, self.group))  # [k, G, g]
        weight = self.weight.unflatten(1, (-1, self.group))
        if self.group == 1:
            variance = self.diagonal[..., 0, 0]
            cost = weight[..., 0].square() / (2 * variance)
            usable = pending[..., 0] & (variance > 0)
        else:
            both = pending[..., None] & pending[..., None, :]
            identity = torch.eye(self.group, dtype=weight.dtype, device=weight.device)
            factor, failed = torch.linalg.cholesky_ex(torch.where(both, self.diagonal, identity))
            weight = torch.where(pending, weight, 0)
            whitened = torch.linalg.solve_triangular(factor, weight[..., None], upper=False)
            cost = 0.5 * whitened.square().sum((-2, -1))
            usable = pending.any(-1) & (failed == 0)
        cost = torch.where(usable & (cost < torch.inf), cost, torch.inf)  # NaN is never the cheapest
        chosen = cost.argmin(1, keepdim=True)  # of ties the first
        return cost.gather(1, chosen), chosen

    def _eliminate(self, pivot: Tensor, valid: Tensor) -> None:
        """Remove weight `pivot` [k, 1] from the blocks in which `valid` [k, 1]."""
        done = self.columns[:, : self.num_columns]
        rows = torch.arange(len(pivot), device=pivot.device) if len(self.inverse) > 1 else 0
        column = self.inverse[rows, pivot[:, 0]].to(done.dtype)  # symmetric: the row is the column
        if self.num_columns:
            factors = done.gather(2, pivot[:, None].expand(-1, self.num_columns, -1)).mT
            column = torch.baddbmm(column[:, None], factors, done, alpha=-1)[:, 0]
        variance = column.gather(1, pivot)
        valid_variance = valid & (variance > 0)  # a weight that nothing compensates for moves no other
        root = torch.where(valid_variance, variance, 1).sqrt()
        # Zero where nothing is pending: what is dead may hold anything, and a group's dead member is a pivot too.
        column = torch.where(self.pending & valid_variance, column / root, 0)
        self.columns[:, self.num_columns] = column
        self.num_columns += 1
        self.weight -= column * (self.weight.gather(1, pivot) / root)
        tiles = column.unflatten(1, (-1, self.group))
        self.diagonal -= tiles[..., None] * tiles[..., None, :]
        self.pending.scatter_(1, pivot, self.pending.gather(1, pivot) & ~valid)

    def _eliminate_dead(self) -> None:
        """Condition the inverse on the dead weights' staying where they are."""
        num_dead = (~self.alive).sum(1, keepdim=True)
        order = self.alive.to(torch.uint8).argsort(dim=1, stable=True)
        most = int(num_dead.max()) if len(num_dead) else 0
        self._reserve(most)
        for step in range(most):
            self._eliminate(order[:, step : step + 1], num_dead > step)

    def _reserve(self, more: int) -> None:
        """Make room for `more` columns."""
        room = self.columns.new_empty(len(self.columns), self.num_columns + more, self.size)
        room[:, : self.num_columns] = self.columns[:, : self.num_columns]
        self.columns = room


def obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """Solve for the joint update of each block through the rows and columns of the pruned."""
    dtype = widened(inverse.dtype)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    identity = torch.eye(weight.shape[1], dtype=dtype, device=weight.device)
    for part in batches(len(weight), identity.numel() * identity.element_size(), weight.device):
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
