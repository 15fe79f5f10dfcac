"""How the other weights move to make up for those that go."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.curvature import Curvature
from fishleg_ext.progress import progress_bar


def simultaneous_update(
    curvature: Curvature, weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Single-weight updates added up, w - F^-1 (pruned * w / diag F^-1), zero where a mask is False.

    Singh and Alistarh 2020; Frantar et al. 2021. Right when few or uncorrelated weights go together.
    """
    inverse_diagonal = curvature.diag()
    pulls = {name: torch.where(masks[name], 0, weight / inverse_diagonal[name]) for name, weight in weights.items()}
    return {
        name: torch.where(masks[name], weights[name] - step, 0).to(weights[name].dtype)
        for name, step in curvature.mul(pulls).items()
    }


def exact_update(
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The best joint update within each block for all weights that are zero afterwards; see `ops.obs_compensate`."""
    updated = {}
    for name, weight in progress_bar(weights.items(), what="compensation", show=progress):
        layout = curvature.layouts[name]
        blocks = curvature.blocks(name)
        moved = ops.obs_compensate(
            blocks.scaled(layout.to_blocks(weight)), blocks.inverse, layout.to_blocks(~masks[name])
        )
        updated[name] = layout.from_blocks(blocks.unscaled(moved)).to(weight.dtype)
    return updated
