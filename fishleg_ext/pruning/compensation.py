"""How the other weights move to make up for those that go."""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature import Curvature


def simultaneous_update(
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    biases: Mapping[str, Tensor] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Single-weight updates added up, w - F^-1 (pruned * w / diag F^-1), zero where a mask is False.

    Singh and Alistarh 2020; Frantar et al. 2021. Right when few or uncorrelated weights go together. Biases (name of
    the weight -> bias) move with them, by their own names.
    """
    inverse_diagonal = curvature.diag()
    pulls = {name: torch.where(masks[name], 0, weight / inverse_diagonal[name]) for name, weight in weights.items()}
    steps = curvature.mul(pulls)
    updated = {
        name: torch.where(masks[name], weight - steps[name], 0).to(weight.dtype) for name, weight in weights.items()
    }
    for name, bias in biases.items():
        if (own := curvature.biases[name]) in steps:
            updated[own] = (bias - steps[own]).to(bias.dtype)
    return updated


def exact_update(
    curvature: Curvature,
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    biases: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The best joint update within each block for all weights that are zero afterwards; see `ops.obs_compensate`.

    Biases (name of the weight -> bias) that the curvature knows move with them, by their own names.
    """
    updated = {}
    for name, weight in progress_bar(weights.items(), what="compensation", show=progress):
        layout = curvature.layouts[name]
        blocks = curvature.blocks(name)
        rows, gone = blocks.rows(layout, weight, biases.get(name), layout.to_blocks(~masks[name]))
        moved, *bias = blocks.parts(layout, ops.obs_compensate(rows, blocks.inverse, gone))
        updated[name] = moved.to(weight.dtype)
        if bias:
            updated[curvature.biases[name]] = bias[0].to(biases[name].dtype)
        del blocks  # before the next are computed
    return updated
