"""Blocks of the empirical Fisher matrix: accumulate them, invert them, or update their inverses."""

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import block_fisher as reference

PRECISIONS = ("ieee", "tf32x3", "tf32")


def _check_update(name: str, target: Tensor, grads: Tensor) -> None:
    """Blocks [K, B, B] that are updated in place by gradients [m, K, B]."""
    checks.dense_floating(**{name: target}, grads=grads)
    checks.single_or_double(**{name: target})
    checks.dims(name, target, "[K, B, B]")
    num_blocks, size = target.shape[:2]
    checks.shape(name, target, "[K, B, B]", (num_blocks, size, size))
    checks.dims("grads", grads, "[m, K, B]")
    checks.shape("grads", grads, "[m, K, B]", (grads.shape[0], num_blocks, size))
    checks.writable(name, target)


@op(reference=reference.block_gram_, mutates=("gram",), kernels=("cuda", "cpu"))
def block_gram_(
    gram: Tensor, grads: Tensor, alpha: float = 1.0, *, precision: str = "ieee", impl: str = "auto"
) -> None:
    """Add gradients to the Gram matrix of each block: gram += alpha * sum_s g_s g_s^T.

    Args:
        gram: [K, B, B], float32 or float64, symmetric; changed in place.
        grads: [m, K, B], floating point; m gradients, cut into K blocks of B weights. May be expanded.
        alpha: factor of the sum.
        precision: the least precise products allowed: "ieee", or "tf32x3" or "tf32" where float32 products may
            be rounded so on a GPU.

    Raises:
        TypeError: a tensor is not dense and floating point, or gram is neither float32 nor float64.
        ValueError: shapes or devices do not fit, gram is expanded, or precision is unknown.
    """
    _check_update("gram", gram, grads)
    if precision not in PRECISIONS:
        raise ValueError(f"expected precision to be one of {', '.join(PRECISIONS)}, got {precision!r}")


def _fake_block_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    inverse = gram.new_empty(gram.shape, dtype=widened(gram.dtype))
    return inverse, gram.new_empty(gram.shape[:1], dtype=torch.int32)


@op(reference=reference.block_inverse, fake=_fake_block_inverse, kernels=("cuda", "cpu"))
def block_inverse(gram: Tensor, damping: float, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Invert each damped block: (gram + damping * I)^-1.

    A block that is not positive definite is damped ten times more, and again, up to twelve times; a damping of 0 is
    first raised to eps * mean(diag).

    Args:
        gram: [K, B, B], floating point; symmetric positive semidefinite. What an implementation reads of its two
            halves is its own affair.
        damping: added to the diagonal, >= 0, in the units of gram.

    Returns:
        inverse [K, B, B], symmetric, in gram's dtype (at least float32), and info int32 [K], how often damping was
        raised for that block: 0 is never, -1 is in vain (or the block is not finite), and then the inverse is NaN.

    Raises:
        TypeError: gram is not dense and floating point.
        ValueError: the shape is wrong, or damping negative or not finite.
    """
    checks.dense_floating(gram=gram)
    checks.dims("gram", gram, "[K, B, B]")
    checks.shape("gram", gram, "[K, B, B]", (gram.shape[0], gram.shape[1], gram.shape[1]))
    if not 0 <= damping < float("inf"):
        raise ValueError(f"expected damping to be finite and >= 0, got {damping}")


@op(reference=reference.woodbury_update_, mutates=("inverse",), kernels=("cuda",))
def woodbury_update_(inverse: Tensor, grads: Tensor, num_grads: int, *, impl: str = "auto") -> None:
    """Add gradients to the inverse of each block, one after the other: H -= (H g)(H g)^T / (num_grads + g^T H g).

    From H = I / damping, `num_grads` gradients lead to (damping I + mean_s g_s g_s^T)^-1.
    Singh and Alistarh, WoodFisher, NeurIPS 2020, eq. 7 (Sherman-Morrison).

    Args:
        inverse: [K, B, B], float32 or float64, symmetric; changed in place.
        grads: [m, K, B], floating point; the next m of the gradients.
        num_grads: how many gradients there are in all, >= 1.

    Raises:
        TypeError: a tensor is not dense and floating point, or inverse is neither float32 nor float64.
        ValueError: shapes or devices do not fit, inverse is expanded, or num_grads < 1.
    """
    _check_update("inverse", inverse, grads)
    if num_grads < 1:
        raise ValueError(f"expected num_grads >= 1, got {num_grads}")
