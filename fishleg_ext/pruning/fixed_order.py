"""Selection and compensation in one sweep from the first column to the last, without looking for the cheapest.

Frantar and Alistarh, SparseGPT, arXiv 2301.00774, algorithm 1. With H = U^T U, U upper triangular, row j of U is what
is left of row j of the inverse H once the columns before j are fixed, over the square root of its diagonal. So one
factorisation, whatever is pruned, serves all rows that share H: pruning weight j costs w_j^2 / (2 U_jj^2), and only
the columns after j compensate for it. Weights that were pruned before are pruned again when their column comes; until
then they count as free to compensate, as any weight does whose column is yet to come.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature import Estimate
from fishleg_ext.sparsity.patterns import UNSTRUCTURED, Pattern

COLUMNS = 128  # of which, unless a pattern is about fewer, the cheapest are chosen together


def fixed_order_prune(
    estimate: Estimate[Any],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    num_pruned: Mapping[str, int],
    biases: Mapping[str, Tensor] | None = None,
    pattern: Pattern = UNSTRUCTURED,
    *,
    progress: bool = False,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Prune each parameter's blocks column by column.

    Args:
        estimate: gives the inverse blocks; best where all rows of a parameter share one.
        weights: name -> tensor.
        masks: name -> bool tensor, True = alive.
        num_pruned: name -> how many weights are pruned afterwards, the dead among them.
        biases: name of the weight -> bias, which moves with it if the curvature knows it.
        pattern: of each m weights, when their columns come, the n that cost most then are kept; groups are pruned
            together.
        progress: show a progress bar.

    Returns:
        name -> bool tensor, True = kept, and name -> moved weights, zero where pruned, and biases, by their own names.

    Raises:
        CurvatureError: an inverse is not positive definite.
    """
    kept, moved = {}, {}
    for name, weight in progress_bar(weights.items(), what="columns", show=progress):
        layout, blocks = estimate.layouts[name], estimate.factored_blocks(name)
        factor = blocks.inverse
        alive, is_weight = layout.to_blocks(masks[name]), layout.is_weight(weight.device)
        bias = (biases or {}).get(name)
        rows, alive, is_weight = blocks.rows(layout.to_blocks(weight), bias, alive, is_weight)
        rows = rows.to(factor.dtype, copy=True)
        keep = _sweep(rows, factor, alive, is_weight, num_pruned[name], layout.block_size, pattern)
        swept, size = blocks.unscaled(rows), layout.block_size
        kept[name] = layout.from_blocks(keep[:, :size])
        moved[name] = layout.from_blocks(swept[:, :size]).to(weight.dtype)
        if bias is not None and swept.shape[1] > size:
            moved[estimate.biases[name]] = swept[:, -1].to(bias.dtype)
    return kept, moved


def _sweep(
    rows: Tensor, factor: Tensor, alive: Tensor, is_weight: Tensor, num_pruned: int, size: int, pattern: Pattern
) -> Tensor:
    """Prune the first `size` columns of rows [K, B], in place, by U [K or 1, B, B]; which are kept, bool [K, B].

    A panel of columns at a time, whose rest is updated by one matrix product; within it columns are contiguous.
    """
    keep = torch.ones_like(alive)
    diagonal = factor.diagonal(dim1=1, dim2=2)  # [K or 1, B]
    sizes = _from_here(is_weight.sum(0))
    regular = bool(alive[:, :size].all()) and bool(is_weight[:, :size].all())
    dead = _from_here((is_weight & ~alive).sum(0))
    unit = pattern.m or pattern.group
    width = unit * max(1, COLUMNS // unit)
    step = pattern.m or width  # columns among which the cheapest are chosen
    for start in range(0, size, width):
        part = slice(start, min(start + width, size))
        panel = rows[:, part].mT.contiguous()  # [width, K]
        multipliers = torch.zeros_like(panel)
        for first in range(part.start, part.stop, step):
            columns = slice(first, min(first + step, part.stop))
            # An equal share of what is left to prune, but at least the dead, and room for the dead that follow.
            left, after = (pattern.max_count(sizes[i]) for i in (first, columns.stop))
            share = round(num_pruned * (left - after) / max(1, left))
            count = max(share, dead[first] - dead[columns.stop], num_pruned - after)
            count = min(count, num_pruned - dead[columns.stop])
            here = panel[columns.start - start : columns.stop - start]  # [step, K]
            chosen, pruned = choose(
                here.mT, diagonal[:, columns], alive[:, columns], is_weight[:, columns], count, pattern, regular
            )
            keep[:, columns] = chosen
            num_pruned -= pruned
            gone = (~chosen).mT.contiguous()
            for j in range(columns.start, columns.stop):
                multiplier = torch.where(gone[j - first], panel[j - start] / diagonal[:, j], 0)  # [K]
                panel[j - start :].addcmul_(factor[:, j, j : part.stop].mT, multiplier, value=-1)
                multipliers[j - start] = multiplier
        rows[:, part] = panel.mT
        rest = factor[:, part, part.stop :]
        product = multipliers.mT @ rest[0] if len(rest) == 1 else (multipliers.mT[:, None] @ rest)[:, 0]
        rows[:, part.stop :] -= product
    rows.masked_fill_(~keep, 0)
    return keep


def _from_here(counts: Tensor) -> list[int]:
    """Sum the counts of each column and of all that follow; one more, 0, at the end."""
    return [*counts.flip(0).cumsum(0).flip(0).tolist(), 0]


def choose(
    rows: Tensor, diagonal: Tensor, alive: Tensor, is_weight: Tensor, count: int, pattern: Pattern, regular: bool
) -> tuple[Tensor, int]:
    """Choose what is kept of some columns, bool [K, n], so that about `count` weights are pruned; and how many are.

    Those of the lowest (rows / diagonal)^2 are pruned. Everything is alive, and a weight, if `regular`.
    """
    score = (rows / diagonal).square()  # twice the cost
    if not regular:
        score = torch.where(alive, score, -torch.inf).masked_fill(~is_weight, torch.nan)
    if (must_keep := pattern.must_keep(score)) is not None:
        if regular and count == rows.numel() // pattern.m * (pattern.m - pattern.n):  # all that may be pruned
            return must_keep, count
        score = score.masked_fill(must_keep, torch.nan)
    if pattern.group > 1:
        score = score.unflatten(1, (-1, pattern.group)).sum(2)
    count = round(count / pattern.group)
    return ops.keep_mask([score], count)[0].repeat_interleave(pattern.group, dim=1), count * pattern.group
