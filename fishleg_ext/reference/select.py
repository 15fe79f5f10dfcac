"""Which weights go: a global count, or n of every m."""

import functools

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened


def keep_mask(scores: list[Tensor], num_pruned: int) -> list[Tensor]:
    """Prune what is below the threshold, and of what equals it the first; NaN is above inf."""
    if not scores:
        return []
    dtype = functools.reduce(torch.promote_types, (score.dtype for score in scores))
    flat = torch.cat([score.reshape(-1).to(dtype) for score in scores])
    keep = torch.ones_like(flat, dtype=torch.bool)
    if num_pruned:
        threshold = flat.kthvalue(num_pruned).values
        below = (flat < threshold) | (threshold.isnan() & ~flat.isnan())
        tie = (flat == threshold) | (threshold.isnan() & flat.isnan())
        keep = ~(below | (tie & (tie.cumsum(0) <= num_pruned - below.sum())))
    parts = keep.split([score.numel() for score in scores])
    return [part.reshape(score.shape).clone() for part, score in zip(parts, scores, strict=True)]


def nm_mask(score: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """A stable sort within each group of m, NaN made alike and wide before: CUDA's may put it before numbers."""
    score = score.to(widened(score.dtype)).masked_fill(score.isnan(), torch.nan)
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], False)
    return keep.flatten(-2).movedim(-1, dim).contiguous()
