"""Elimination and compensation: in C++ (csrc/cpu_obs.cpp) on a CPU where that is built, else in batched PyTorch.

What grows with B^3 is done by matrix products, whichever it is. The batched form runs on any device: a GPU takes it for
what its own kernels do not.
"""

from typing import Any

import torch
from torch import Tensor

from fishleg_ext import cpu
from fishleg_ext.common.dtypes import widened
from fishleg_ext.cpu.block_fisher import is_faster_in_cpp, swept
from fishleg_ext.reference import obs as reference
from fishleg_ext.reference.batches import block_slices
from fishleg_ext.reference.block_fisher import damped_cholesky

PANEL = 16
COLUMNS = 128  # that are quantized in a given order before the rest follows
INVERSION = 5  # operations that the inversion of [B, B] is worth, over B^3
MOST_GROUP = 64  # weights that csrc/cpu_obs.cpp eliminates together


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
    if _in_cpp(weight) and group <= MOST_GROUP:
        options = (group, n, m, torch.inf if stop is None else stop, dead_first)
        weight, alive = weight.to(dtype).contiguous(), alive.contiguous()
        torch.ops.fishleg_ext_cpu.obs_eliminate_out(weight, _rows(inverse, dtype), alive, *options, rank, cost)
        return rank, cost
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

    def quantize(self, codes: reference.Codes, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Set the cheapest weight of every block to its code, again and again; code, cost and weight.

        Args:
            codes: that weights go to.
            free: bool [k, B], alive weights that have no codes.
        """
        coded = self.alive & ~free
        pending = coded.clone()
        code = torch.zeros(coded.shape, dtype=torch.uint8, device=coded.device)
        cost = torch.where(pending, torch.inf, 0).to(self.weight.dtype)
        result = torch.zeros_like(cost)
        steps = pending.sum(1)
        for _ in range(int(steps.max()) if len(steps) else 0):
            nearest, value, beyond = codes.nearest(self.weight)
            variance, move = self.diagonal[..., 0, 0], self.weight - value
            pivot = reference.next_to_code(move, variance, pending, beyond)[:, None]
            own = variance.gather(1, pivot)
            valid = pending.gather(1, pivot) & (own > 0)
            aim = value.gather(1, pivot)
            spent = move.gather(1, pivot).square() / (2 * own)
            for out, now in ((code, nearest.gather(1, pivot).to(torch.uint8)), (cost, spent), (result, aim)):
                out.scatter_(1, pivot, torch.where(valid, now, out.gather(1, pivot)))
            pending.scatter_(1, pivot, pending.gather(1, pivot) & ~valid)
            self._eliminate(pivot, valid, aim)
        nearest, value, _ = codes.nearest(self.weight)  # what nothing compensates
        code = torch.where(pending, nearest.to(torch.uint8), code)
        result = torch.where(pending, value, result)
        return code, cost, torch.where(free, self.weight, result)

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
            cost = reference.joint_cost(self.weight.unflatten(1, (-1, self.group)), self.diagonal, pending)
            usable = pending.any(-1)
        cost = torch.where(usable & (cost < torch.inf), cost, torch.inf)  # NaN is never the cheapest
        return torch.min(cost, dim=1, keepdim=True)  # of ties the first

    def _eliminate(self, pivot: Tensor, valid: Tensor, target: Tensor | float = 0.0) -> None:
        """Set weight `pivot` [k, 1] to `target` [k, 1], and for good, in the blocks in which `valid` [k, 1]."""
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
        self.weight -= column * torch.where(valid, (self.weight.gather(1, pivot) - target) / root, 0)
        tiles = column.unflatten(1, (-1, self.group))
        self.diagonal -= tiles[..., None] * tiles[..., None, :]

    def _subtract_columns(self) -> None:
        """Begin a new panel."""
        inverse = self.inverse.expand(len(self.columns), -1, -1)
        out = inverse if self.own else torch.empty_like(inverse, memory_format=torch.contiguous_format)
        self.inverse = torch.baddbmm(inverse, self.columns.mT, self.columns, alpha=-1, out=out)
        self.blocks = torch.arange(len(out), device=out.device)
        self.own, self.num_columns = True, 0


def supports_obs_quantize(*arguments: Any, **options: Any) -> tuple[bool, str]:
    """Every argument is taken, on any device."""
    return True, ""


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
    """Work on some blocks at a time, in panels of columns; see `ops.obs_quantize`."""
    num_blocks, size = weight.shape
    dtype = widened(inverse.dtype)
    found = []
    free = torch.arange(size, device=weight.device) >= size - num_free
    for part in block_slices(num_blocks, 2 * size * size * dtype.itemsize, weight.device):
        block = (inverse if len(inverse) == 1 else inverse[part]).to(dtype)
        codes = reference.Codes(codebook if len(codebook) == 1 else codebook[part], dtype, num_free)
        if order == "given":
            found.append(_in_order(weight[part].to(dtype), block, alive[part], codes))
            continue
        elimination = _Elimination(weight[part], block, alive[part] | free, 1)
        if dead_first:
            elimination.condition_on_dead()
        found.append(elimination.quantize(codes, free.expand(len(elimination.weight), -1)))
    if not found:
        cost = weight.new_empty(weight.shape, dtype=dtype)
        return weight.new_empty(weight.shape, dtype=torch.uint8), cost, torch.empty_like(cost)
    code, cost, result = map(torch.cat, zip(*found, strict=True))
    return code, cost, result


def _in_order(weight: Tensor, inverse: Tensor, alive: Tensor, codes: reference.Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize column after column by H = U^T U: row j of U is what is left of row j of H, over the root of H_jj.

    One factorisation serves all blocks that share H. A panel of columns at a time, whose rest is updated by one matrix
    product.
    """
    size = weight.shape[1]
    last = size - codes.num_free
    factor, info = damped_cholesky(inverse, 0.0)
    factor = torch.where(info[:, None, None] < 0, torch.nan, factor).mT  # [k or 1, B, B]
    diagonal = factor.diagonal(dim1=1, dim2=2)
    code = torch.zeros(weight.shape, dtype=torch.uint8, device=weight.device)
    cost, weight = torch.zeros_like(weight), weight.clone()
    for start in range(0, last, COLUMNS):
        part = slice(start, min(start + COLUMNS, last))
        errors = weight.new_empty(len(weight), part.stop - start)
        for j in range(start, part.stop):
            nearest, value = codes.nearest_of_column(weight[:, j], j, size)
            target = torch.where(alive[:, j], value, 0)
            error = (weight[:, j] - target) / diagonal[:, j]
            code[:, j] = torch.where(alive[:, j], nearest, 0)
            cost[:, j] = error.square() / 2
            weight[:, j : part.stop] -= error[:, None] * factor[:, j, j : part.stop]
            weight[:, j] = torch.where(error.isnan(), torch.nan, target)
            errors[:, j - start] = error
        rest = factor[:, part, part.stop :]
        weight[:, part.stop :] -= errors @ rest[0] if len(rest) == 1 else (errors[:, None] @ rest)[:, 0]
    return code, cost, weight


def supports_obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> tuple[bool, str]:
    """Every argument is taken, on any device."""
    return True, ""


def obs_compensate(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """Solve through the pruned or, where all blocks share an inverse and fewer are kept, through the kept.

    With F the inverse of H, the joint update of the kept is also F_KK^-1 F_KP w_P: with a tenth of a row kept the
    system is a thousandth of the work.
    """
    dtype = widened(inverse.dtype)
    size, num_pruned = weight.shape[1], pruned.sum(1).double()
    # Operations, of which float64 takes two: of one row through P rather than K, and of inverting H once.
    spared = num_pruned**3 / 3 - 2 * (size - num_pruned) ** 3 / 3
    through_kept = (spared > 0) & (spared.clamp(min=0).sum() > INVERSION * size**3)
    if len(inverse) > 1 or not through_kept.any() or not (inverse.diagonal(dim1=1, dim2=2) > 0).all():
        return _through_pruned(weight, inverse, pruned, dtype)
    fisher, info = _inverted(inverse[0])
    if info:  # not positive definite to rounding
        return _through_pruned(weight, inverse, pruned, dtype)
    result = torch.empty_like(weight, memory_format=torch.contiguous_format)
    result[through_kept] = _through_kept(weight[through_kept], fisher, pruned[through_kept])
    rest = ~through_kept
    result[rest] = _through_pruned(weight[rest], inverse, pruned[rest], dtype)
    return result


def _through_kept(weight: Tensor, fisher: Tensor, pruned: Tensor) -> Tensor:
    """Return w_K + F_KK^-1 F_KP w_P, in float64, which costs little where K is small."""
    wide = weight.double()
    force = torch.where(pruned, wide, 0) @ fisher
    step, solved = masked_solve(fisher[None], ~pruned, force)
    step[~solved] = torch.nan
    return torch.where(pruned, 0, wide + step).to(weight.dtype)


def _through_pruned(weight: Tensor, inverse: Tensor, pruned: Tensor, dtype: torch.dtype) -> Tensor:
    """Return w - H[:, P] (H[P, P])^-1 w_P."""
    if not _in_cpp(weight):
        return reference.obs_compensate(weight, inverse, pruned)
    rows = _rows(inverse, dtype)
    through = pruned & (inverse.diagonal(dim1=1, dim2=2) != 0)
    multiplier, solved = masked_solve(rows, through, torch.where(through, weight.to(dtype), 0))
    step = multiplier @ rows[0] if len(rows) == 1 else (rows @ multiplier[..., None])[..., 0]
    moved = torch.empty_like(weight, memory_format=torch.contiguous_format)
    moved.copy_(torch.where(pruned, 0, weight - step))
    if not solved.all():
        failed = ~solved
        own = inverse if len(inverse) == 1 else inverse[failed]
        moved[failed] = reference.obs_compensate(weight[failed], own, pruned[failed])
    return moved


def masked_solve(matrix: Tensor, mask: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
    """Solve M[S, S] x[S] = rhs[S] for each block, S being where the mask is True.

    Args:
        matrix: M, [K or 1, B, B], symmetric positive definite.
        mask: bool [K, B].
        rhs: [K, B].

    Returns:
        x [K, B], zero outside S, and bool [K], False where M[S, S] is not positive definite to rounding.
    """
    if _in_cpp(rhs):
        x = torch.empty_like(rhs, memory_format=torch.contiguous_format)
        solved = mask.new_empty(len(mask))
        torch.ops.fishleg_ext_cpu.masked_solve_out(
            _rows(matrix, rhs.dtype), mask.contiguous(), rhs.contiguous(), x, solved
        )
        return x, solved
    x, solved = torch.zeros_like(rhs), mask.new_ones(len(mask))
    counts = mask.sum(1)
    most = int(counts.max()) if len(counts) else 0
    order = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]  # of S first
    inside = mask.gather(1, order)
    for part in block_slices(len(rhs), 3 * most**2 * rhs.element_size(), rhs.device):
        index, own = order[part], matrix if len(matrix) == 1 else matrix[part]
        blocks = torch.arange(len(index), device=rhs.device)[:, None, None] * (len(matrix) > 1)
        small = own[blocks, index[:, :, None], index[:, None]]
        both = inside[part, :, None] & inside[part, None, :]
        factor, info = torch.linalg.cholesky_ex(torch.where(both, small, torch.eye(most).to(small)))
        found = torch.where(inside[part], rhs[part].gather(1, index), 0)
        x[part] = x[part].scatter(1, index, torch.cholesky_solve(found[..., None], factor)[..., 0])
        solved[part] = info == 0
    return torch.where(mask, x, 0), solved


def _inverted(matrix: Tensor) -> tuple[Tensor, int]:
    """Invert a symmetric matrix in float64; the number is 0 where it is positive definite."""
    if _in_cpp(matrix) and is_faster_in_cpp(matrix[None]):
        (inverse,), inverted = swept(matrix.double().contiguous()[None], 0.0)
        return inverse, int(not inverted)
    factor, info = torch.linalg.cholesky_ex(matrix.double())
    return torch.cholesky_inverse(factor), int(info)


def _in_cpp(tensor: Tensor) -> bool:
    """Tell whether the C++ kernels are here for this tensor."""
    return tensor.device.type == "cpu" and cpu.not_loaded() is None


def _rows(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Return matrices as the kernels read them: rows of any stride; what all blocks share is not copied for each."""
    matrices = (matrices[:1] if matrices.stride(0) == 0 else matrices).to(dtype)
    return matrices if matrices.stride(2) == 1 else matrices.contiguous()
