"""Quantization by elimination: weights go to their codes one by one, and the others of their block compensate.

Frantar and Alistarh, OBQ, arXiv 2208.11580; in a given order Frantar et al., GPTQ, arXiv 2210.17323. With a mask the
pruned weights are eliminated first, so that pruning and quantization are one elimination with two kinds of targets.
"""

import math

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature import Blocks, CurvatureError
from fishleg_ext.reference.batches import block_slices

SPARSE = 0.5  # share of kept weights up to which they are taken out of their blocks


def tables_of_blocks(table: Tensor, layout: BlockLayout, group_size: int) -> Tensor:
    """Return the codes of each segment of each block, [K or 1, S, C], from those of groups [G, C].

    Groups are `group_size` consecutive weights, as blocks are `block_size`; a segment is of one group.
    """
    if len(table) == 1:
        return table[None]
    segment = math.gcd(layout.block_size, group_size)
    first = torch.arange(0, layout.num_blocks * layout.block_size, segment, device=table.device)
    group = (first // group_size).clamp(max=len(table) - 1)
    return table[group].unflatten(0, (layout.num_blocks, -1))


def eliminate_to_codes(
    blocks: Blocks,
    rows: Tensor,
    kept: Tensor,
    table: Tensor,
    *,
    order: str,
    conditioned: bool,
) -> Tensor:
    """Quantize the blocks of one parameter.

    Args:
        blocks: of its inverse, without a bias.
        rows: [K, B], the weights; those not kept need not be zero yet.
        kept: bool [K, B].
        table: [K or 1, S, C], the values of the codes, ascending.
        order: "cheapest" or "given"; see `ops.obs_quantize`.
        conditioned: whether the inverse is that of the kept weights.

    Returns:
        codes uint8 [K, B], indices into the table.

    Raises:
        CurvatureError: an inverse is not positive definite to rounding, so that compensation gives NaN.
    """
    dtype = blocks.inverse.dtype
    size = rows.shape[1]
    codes = torch.zeros(rows.shape, dtype=torch.uint8, device=rows.device)
    precision = None
    most = int(kept.sum(1).max()) if len(kept) else 0
    sparse = order == "cheapest" and most <= SPARSE * size and table.shape[1] == 1
    if sparse and len(blocks.inverse) == 1:
        precision = _inverted(blocks.inverse)
    for part in block_slices(len(rows), 4 * size * size * dtype.itemsize, rows.device):
        scale = None if blocks.weight_scale is None else blocks.weight_scale[part]
        inverse = _scaled(blocks.inverse if len(blocks.inverse) == 1 else blocks.inverse[part], scale)
        mask, own = kept[part], table if len(table) == 1 else table[part]
        weight = rows[part].to(dtype)
        if order == "given":
            codes[part], cost, _ = ops.obs_quantize(weight, inverse, mask, own, order=order)
            _check_finite(cost)
            continue
        if not conditioned and bool((~mask & (weight != 0)).any()):
            weight = ops.obs_compensate(weight, inverse, ~mask)
            _check_finite(weight)
        if not sparse:
            codes[part] = ops.obs_quantize(weight, inverse, mask, own, dead_first=not conditioned)[0]
            continue
        # The kept weights alone: of the Fisher matrix their rows and columns, whose inverse is theirs.
        index = mask.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most]
        real = mask.gather(1, index)
        if conditioned:
            small = _taken(inverse, index)
        else:
            own_scale = None if scale is None else torch.where(scale != 0, 1 / scale, 0)
            fisher = _scaled(_inverted(inverse) if precision is None else precision, own_scale)
            small = _taken(fisher, index)
            small = torch.where(real[:, :, None] & real[:, None, :], small, torch.eye(most).to(small))
            small = _inverted(small).to(dtype)
        found = ops.obs_quantize(weight.gather(1, index), small, real, own)[0]
        codes[part] = codes[part].scatter(1, index, torch.where(real, found, 0))
    return codes


def _scaled(matrix: Tensor, scale: Tensor | None) -> Tensor:
    """Scale rows and columns of [K or 1, B, B] by [K, B]."""
    return matrix if scale is None else scale[:, :, None] * matrix * scale[:, None, :]


def _taken(matrix: Tensor, index: Tensor) -> Tensor:
    """Return rows and columns [K, m] of [K or 1, B, B]."""
    block = torch.arange(len(index), device=index.device)[:, None, None] * (len(matrix) > 1)
    return matrix[block, index[:, :, None], index[:, None, :]]


def _inverted(matrix: Tensor) -> Tensor:
    inverse, info = ops.block_inverse(matrix.double(), 0.0)
    _check_finite(torch.where(info < 0, torch.nan, 0.0))
    return inverse


def _check_finite(numbers: Tensor) -> None:
    if not numbers.isfinite().all():
        raise CurvatureError("an inverse is not positive definite to rounding; use more damping")
