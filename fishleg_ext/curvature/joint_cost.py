"""The least loss increase of pruning a set of weights, from the best step that zeroes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fishleg_ext import ops

# Conjugate gradients end after so many steps, or when one gains less than this share of the cost.
STEPS = 100
TOLERANCE = 1e-8

FisherMul = Callable[[Tensor], Tensor]


def joint_cost(weight: Tensor, inverse: Tensor, pruned: Tensor, fisher_mul: FisherMul) -> float:
    """Return 1/2 dw^T F dw of the best step dw that zeroes the set P, block by block.

    Args:
        weight: [K, B].
        inverse: [K or 1, B, B], of the blocks of F.
        pruned: bool [K, B], True in P.
        fisher_mul: dw [K, B] -> F dw.
    """
    step = ops.obs_compensate(weight, inverse, pruned) - weight
    return 0.5 * float((step * fisher_mul(step)).sum(dtype=torch.float64))


def least_cost(step: Tensor, pruned: Tensor, fisher_mul: FisherMul, fisher_diagonal: Tensor) -> float:
    """Return the minimum of 1/2 dw^T F dw over the steps that are as `step` in the set P, by conjugate gradients.

    They start from `step`, so that the result never exceeds what it costs, and are preconditioned by the diagonal.

    Args:
        step: any shape.
        pruned: bool, True in P.
        fisher_mul: dw -> F dw, F of any structure.
        fisher_diagonal: of F.
    """
    force = fisher_mul(step)
    cost = 0.5 * (step * force).sum()
    residual = torch.where(pruned, 0, -force)
    direction = residual / fisher_diagonal
    product = (residual * direction).sum()
    for _ in range(STEPS):
        if product <= 0:
            break
        curved = fisher_mul(direction)
        length = product / (direction * curved).sum()
        gain = 0.5 * length * product
        cost -= gain
        if gain <= TOLERANCE * cost:
            break
        residual -= length * torch.where(pruned, 0, curved)
        scaled = residual / fisher_diagonal
        product, before = (residual * scaled).sum(), product
        direction = scaled + product / before * direction
    return float(cost)
