"""Which weights go: a global count, or n of every m."""

import functools

import torch
from torch import Tensor


def keep_mask(scores: list[Tensor], num_pruned: int) -> list[Tensor]:
    """One stable sort of all scores; PyTorch sorts NaN above inf."""
    if not scores:
        return []
    dtype = functools.reduce(torch.promote_types, (score.dtype for score in scores))
    order = torch.cat([score.reshape(-1).to(dtype) for score in scores]).argsort(stable=True)
    keep = torch.ones_like(order, dtype=torch.bool)
    keep[order[:num_pruned]] = False
    parts = keep.split([score.numel() for score in scores])
    return [part.reshape(score.shape).clone() for part, score in zip(parts, scores, strict=True)]


def nm_mask(score: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    """A stable sort within each group of m."""
    groups = score.movedim(dim, -1).unflatten(-1, (-1, m))
    order = groups.argsort(dim=-1, stable=True)
    keep = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, order[..., : m - n], False)
    return keep.flatten(-2).movedim(-1, dim).contiguous()
