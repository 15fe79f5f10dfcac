"""The diagonal of the Fisher matrix as a running mean."""

import torch
from torch import Tensor


def fisher_diag_update_(fisher: list[Tensor], grads: list[Tensor], beta: float) -> None:
    """One decay and one square for each entry."""
    for average, grad in zip(fisher, grads, strict=True):
        grad = grad.to(average.dtype)
        torch.addcmul(average * beta, grad, grad, value=1 - beta, out=average)
