"""Chooses what is pruned by the alternating direction method of multipliers (ADMM), all weights of a layer together.

Meng et al., ALPS, arXiv 2406.07831, for any curvature with blocks. With F the curvature of a row u, minimise
1/2 (u - u0)^T F (u - u0) over the rows together, with as few entries as asked for: take in turn the u of least cost
that stays near a sparse d, and the sparse d nearest to u, and make them agree by ever more weight rho on their
distance. Greedy elimination never takes back what it pruned; this does, which matters where the choice is narrow, as in
patterns of n:m. In the units in which F has a unit diagonal, so that "near" means the same for each weight. Costs one
eigendecomposition for each F, and two products with its eigenvectors a step.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature import Estimate
from fishleg_ext.curvature.base import Blocks, CurvatureError
from fishleg_ext.pruning.fixed_order import choose
from fishleg_ext.sparsity.patterns import UNSTRUCTURED, Pattern

STEPS, EVERY = 300, 3  # at most, and after how many of them rho grows
RHO = 0.1  # at first
# By what rho grows where at least so large a share of the kept weights has changed since it grew last.
GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))


def admm_masks(
    estimate: Estimate[Any],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    num_pruned: Mapping[str, int],
    pattern: Pattern = UNSTRUCTURED,
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Choose masks of each parameter.

    Args:
        estimate: gives the inverse blocks.
        weights: name -> tensor.
        masks: name -> bool tensor, True = alive.
        num_pruned: name -> how many weights are pruned afterwards, the dead among them.
        pattern: that masks keep to.
        progress: show a progress bar.

    Returns:
        name -> bool tensor, True = kept.

    Raises:
        CurvatureError: an inverse is not positive definite.
    """
    kept = {}
    for name, weight in progress_bar(weights.items(), what="ADMM", show=progress):
        layout, blocks = estimate.layouts[name], estimate.blocks(name)
        alive, is_weight = layout.to_blocks(masks[name]), layout.is_weight(weight.device)
        rows = blocks.scaled(layout.to_blocks(weight)).to(blocks.inverse.dtype)
        try:
            keep = _support(rows, blocks, alive & is_weight, is_weight, num_pruned[name], pattern)
        except torch.linalg.LinAlgError as error:
            raise CurvatureError(f"{name}: {error}") from None
        kept[name] = layout.from_blocks(keep)
    return kept


def _support(
    rows: Tensor, blocks: Blocks, alive: Tensor, is_weight: Tensor, num_pruned: int, pattern: Pattern
) -> Tensor:
    """Return which of rows [K, B] are kept, bool."""
    size = rows.shape[1]
    # Without its bias the inverse is that of the weights when the bias is free to move.
    values, vectors = torch.linalg.eigh(blocks.inverse[:, :size, :size].double())
    if bool((values[:, 0] <= 0).any()):
        raise torch.linalg.LinAlgError("its inverse is not positive definite")
    fisher = (vectors / values[:, None]) @ vectors.mT  # [K or 1, B, B]
    unit = fisher.diagonal(dim1=1, dim2=2).rsqrt()
    values, vectors = torch.linalg.eigh(fisher * unit[:, :, None] * unit[:, None])
    values, vectors = values.to(rows.dtype), vectors.to(rows.dtype)
    start = rows / unit.to(rows.dtype)  # [K, B]
    if blocks.cost_scale is not None:
        start = start * blocks.cost_scale.sqrt()
    one = torch.ones_like(start[:1])
    regular = bool(alive.all())
    sparse = lambda x: choose(x, one, alive, is_weight, num_pruned, pattern, regular)[0] & alive
    pulled = _product(start, vectors, values)
    keep, dual, rho = sparse(start), torch.zeros_like(start), RHO
    near, before = torch.where(keep, start, 0), keep
    for step in range(1, STEPS + 1):
        least = _product(pulled - dual + rho * near, vectors, 1 / (values + rho))
        moved = least + dual / rho
        keep = sparse(moved)
        near = torch.where(keep, moved, 0)
        dual += rho * (least - near)
        if step % EVERY == 0:
            changed = int((keep ^ before).sum())
            if not changed:
                break
            share, before = changed / max(1, int(keep.sum())), keep
            rho *= next(growth for least_share, growth in GROWTH if share >= least_share)
    return keep | ~is_weight


def _product(rows: Tensor, vectors: Tensor, values: Tensor) -> Tensor:
    """Multiply rows [K, B] by V diag(values) V^T, V [K or 1, B, B]."""
    if len(vectors) == 1:
        return ((rows @ vectors[0]) * values) @ vectors[0].mT
    return (((rows[:, None] @ vectors) * values[:, None]) @ vectors.mT)[:, 0]
