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
from fishleg_ext.curvature import CurvatureError, Estimate
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
        layout, blocks = estimate.layouts[name], estimate.blocks(name)
        factor, failed = torch.linalg.cholesky_ex(blocks.inverse.double())
        if failed.any():
            raise CurvatureError(f"{name}: the inverse is not positive definite to rounding; use more damping")
        alive, is_weight = layout.to_blocks(masks[name]), layout.is_weight(weight.device)
        rows, alive, is_weight = blocks.rows(layout, weight, biases.get(name) if biases else None, alive, is_weight)
        rows = rows.to(blocks.inverse.dtype, copy=True)
        keep = _sweep(rows, factor.mT.to(rows.dtype), alive, is_weight, num_pruned[name], layout.block_size, pattern)
        swept, *bias = blocks.parts(layout, rows)
        kept[name] = layout.from_blocks(keep[:, : layout.block_size])
        moved[name] = swept.to(weight.dtype)
        if bias and biases:
            moved[estimate.biases[name]] = bias[0].to(biases[name].dtype)
    return kept, moved


def _sweep(
    rows: Tensor, factor: Tensor, alive: Tensor, is_weight: Tensor, num_pruned: int, size: int, pattern: Pattern
) -> Tensor:
    """Prune the first `size` columns of rows [K, B], in place, by U [K or 1, B, B]; which are kept, bool [K, B]."""
    keep = torch.ones_like(alive)
    diagonal = factor.diagonal(dim1=1, dim2=2)  # [K or 1, B]
    sizes, dead = is_weight.sum(0), (is_weight & ~alive).sum(0)  # of each column
    step = pattern.m or pattern.group * max(1, COLUMNS // pattern.group)
    for start in range(0, size, step):
        part = slice(start, min(start + step, size))
        # An equal share of what is left to prune, but at least the dead, and room for the dead that follow.
        left, after = (pattern.max_count(int(sizes[i:].sum())) for i in (start, part.stop))
        share = round(num_pruned * (left - after) / max(1, left))
        count = min(max(share, int(dead[part].sum()), num_pruned - after), num_pruned - int(dead[part.stop :].sum()))
        score = ops.obs_score(rows[:, part], diagonal[:, part].square().expand_as(rows[:, part]))
        score = torch.where(alive[:, part], score, -torch.inf).masked_fill(~is_weight[:, part], torch.nan)
        if (must_keep := pattern.must_keep(score)) is not None:
            score = score.masked_fill(must_keep, torch.nan)
        if pattern.group > 1:
            score = score.unflatten(1, (-1, pattern.group)).sum(2)
        count = round(count / pattern.group)
        num_pruned -= count * pattern.group
        keep[:, part] = ops.keep_mask([score], count)[0].repeat_interleave(pattern.group, dim=1)
        multipliers = torch.zeros_like(rows[:, part])
        for j in range(part.start, part.stop):
            multiplier = torch.where(keep[:, j], 0, rows[:, j] / diagonal[:, j])  # [K]
            rows[:, j : part.stop] -= multiplier[:, None] * factor[:, j, j : part.stop]
            multipliers[:, j - start] = multiplier
        rest = factor[:, part, part.stop :]
        rows[:, part.stop :] -= multipliers @ rest[0] if len(rest) == 1 else (multipliers[:, None] @ rest)[:, 0]
    rows.masked_fill_(~keep, 0)
    return keep
