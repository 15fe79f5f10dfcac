"""Selection: an exact number of weights over all tensors, or n of every m."""

import torch
from torch import Tensor

from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import select as reference


def _fake_keep_mask(scores: list[Tensor], num_pruned: int) -> list[Tensor]:
    return [score.new_empty(score.shape, dtype=torch.bool) for score in scores]


@op(reference=reference.keep_mask, fake=_fake_keep_mask, kernels=("cuda",))
def keep_mask(scores: list[Tensor], num_pruned: int, *, impl: str = "auto") -> list[Tensor]:
    """Mark the `num_pruned` lowest scores of all tensors together as pruned (False).

    The count is exact: of equal scores the earlier tensor, and in it the lower flat index, is pruned first. NaN ranks
    above inf, so it is kept. The host is never synchronised.

    Args:
        scores: tensors of any shapes, floating point, on one device.
        num_pruned: how many entries become False, 0 to the number of scores.

    Returns:
        a bool tensor for each tensor of scores, True = kept.

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: the devices differ, or num_pruned is out of range.

    Examples:
        >>> keep_mask([torch.tensor([3.0, 1.0]), torch.tensor([2.0])], 2)
        [tensor([ True, False]), tensor([False])]
    """
    if scores:
        checks.dense_floating(**{f"scores[{index}]": score for index, score in enumerate(scores)})
    total = sum(score.numel() for score in scores)
    if not 0 <= num_pruned <= total:
        raise ValueError(f"expected num_pruned from 0 to {total}, the number of scores, got {num_pruned}")


def _fake_nm_mask(score: Tensor, n: int, m: int, dim: int = -1) -> Tensor:
    return score.new_empty(score.shape, dtype=torch.bool)


@op(reference=reference.nm_mask, fake=_fake_nm_mask)
def nm_mask(score: Tensor, n: int, m: int, dim: int = -1, *, impl: str = "auto") -> Tensor:
    """Keep the n highest of each m consecutive scores; of ties the lower position is pruned, NaN ranks above inf.

    Args:
        score: any shape, floating point.
        n: how many of each m are kept, 0 <= n <= m.
        m: consecutive scores of which n are kept.
        dim: the dimension along which groups of m lie; its size is a multiple of m.

    Returns:
        a bool tensor of score's shape, True = kept.

    Raises:
        TypeError: score is not dense and floating point.
        ValueError: n and m do not suit each other or the size of dim.
        IndexError: score has no dimension dim.

    Examples:
        >>> nm_mask(torch.tensor([4.0, 1.0, 2.0, 2.0]), 2, 4)
        tensor([ True, False, False,  True])
    """
    checks.dense_floating(score=score)
    if m < 1 or not 0 <= n <= m:
        raise ValueError(f"expected 0 <= n <= m and m >= 1, got n={n}, m={m}")
    if not -score.dim() <= dim < score.dim():
        raise IndexError(f"expected dim of a tensor of shape {list(score.shape)}, got {dim}")
    if score.shape[dim] % m:
        raise ValueError(f"expected the size of dim {dim} to be a multiple of m = {m}, got {score.shape[dim]}")
