"""Moves the kept weights to compensate for the pruned ones."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature import Estimate


def simultaneous_update(
    estimate: Estimate[Any],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    biases: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Add up the single-weight updates, w - F^-1 (pruned * w / diag F^-1), zero where a mask is False.

    Singh and Alistarh 2020; Frantar et al. 2021. Right when few or uncorrelated weights are pruned together. Biases
    (name of the weight -> bias) are compensated with them, by their own names.
    """
    inverse_diagonal = estimate.diag()
    pulls = {name: torch.where(masks[name], 0, weight / inverse_diagonal[name]) for name, weight in weights.items()}
    steps = estimate.mul(pulls)
    updated = {
        name: torch.where(masks[name], weight - steps[name], 0).to(weight.dtype) for name, weight in weights.items()
    }
    for name, bias in (biases or {}).items():
        if (own := estimate.biases[name]) in steps:
            updated[own] = (bias - steps[own]).to(bias.dtype)
    return updated


def exact_update(
    estimate: Estimate[Any],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    biases: Mapping[str, Tensor] | None = None,
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Return the best joint update within each block for all weights that are pruned; see `ops.obs_compensate`.

    Biases (name of the weight -> bias) that the curvature knows are compensated with them, by their own names.
    """
    updated = {}
    for name, weight in progress_bar(weights.items(), what="compensation", show=progress):
        layout, bias = estimate.layouts[name], (biases or {}).get(name)
        before, pruned = layout.to_blocks(weight), layout.to_blocks(~masks[name])
        moved = []
        for part, blocks in estimate.blocks_at_a_time(name):
            rows, here = blocks.rows(before[part], None if bias is None else bias[part], pruned[part])
            moved.append(blocks.unscaled(ops.obs_compensate(rows, blocks.inverse, here)))
            del blocks  # before the next are computed
        after = torch.cat(moved)
        updated[name] = layout.from_blocks(after[:, : layout.block_size]).to(weight.dtype)
        if bias is not None and after.shape[1] > layout.block_size:
            updated[estimate.biases[name]] = after[:, -1].to(bias.dtype)
    return updated
