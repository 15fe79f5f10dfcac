"""The diagonal Fisher matrix as a running mean of squared gradients."""

import torch
from torch import Tensor

from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import diag_fisher as reference


@op(reference=reference.fisher_diag_update_, mutates=("fisher",), kernels=("triton",))
def fisher_diag_update_(fisher: list[Tensor], grads: list[Tensor], beta: float, *, impl: str = "auto") -> None:
    """Move a running mean of squared gradients: f = beta f + (1 - beta) g^2, for every pair of tensors.

    This is Adam's second moment; Tu et al. 2016, arXiv 1605.04859, read the Fisher diagonal off it.

    Args:
        fisher: tensors in float32 or float64; changed in place.
        grads: as many floating-point tensors of the same shapes.
        beta: decay, 0 <= beta <= 1.

    Raises:
        TypeError: a tensor is not dense and floating point, or a fisher neither float32 nor float64.
        ValueError: lengths, shapes or devices do not fit, a fisher is expanded, or beta is out of range.
    """
    checks.same_length("fisher", fisher, "grads", grads)
    for index, (average, grad) in enumerate(zip(fisher, grads, strict=True)):
        if _fits(average, grad):  # in a sixth of the time
            continue
        names = f"fisher[{index}]", f"grads[{index}]"
        checks.dense_floating(**dict(zip(names, (average, grad), strict=True)))
        checks.single_or_double(**{names[0]: average})
        checks.shape(names[1], grad, f"of {names[0]}", average.shape)
        checks.writable(names[0], average)
    if not 0 <= beta <= 1:
        raise ValueError(f"expected beta in [0, 1], got {beta}")


def _fits(average: Tensor, grad: Tensor) -> bool:
    """Tell whether a pair is as it mostly is, so that nothing else need be looked at."""
    return (
        average.dtype is torch.float32
        and grad.dtype is torch.float32
        and average.shape == grad.shape
        and average.device == grad.device
        and average.layout is grad.layout is torch.strided
        and average.is_contiguous()
    )
