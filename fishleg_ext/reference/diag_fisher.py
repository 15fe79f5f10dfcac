"""The diagonal of the Fisher matrix as a running mean."""

import torch
from torch import Tensor


def fisher_diag_update_(fisher: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """One decay and one square for each entry."""
    if fisher:
        grads = [grad.to(average.dtype) for average, grad in zip(fisher, grads, strict=True)]
        torch._foreach_mul_(fisher, beta)
        torch._foreach_addcmul_(fisher, grads, grads, value=1 - beta)
