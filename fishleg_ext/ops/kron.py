"""Kronecker-factored inverses: products and diagonal."""

from torch import Tensor

from fishleg_ext.dtypes import widened
from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import kron as reference


def _check_factors(row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> None:
    checks.dense_floating(row_factor=row_factor, col_factor=col_factor, scale=scale)
    checks.dims("scale", scale, "[o, i]")
    rows, cols = scale.shape
    checks.shape("row_factor", row_factor, "[o, o]", (rows, rows))
    checks.shape("col_factor", col_factor, "[i, i]", (cols, cols))


def _fake_kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(x.shape, dtype=widened(row_factor.dtype, col_factor.dtype, scale.dtype))


@op(reference=reference.kron_mul, fake=_fake_kron_mul)
def kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """Multiply by a Kronecker-factored inverse: Q x = scale * (P (scale * x) M).

    McGowan et al., FishLeg Surgeon, arXiv 2412.02328.

    Args:
        x: [..., o, i], floating point.
        row_factor: P, [o, o], symmetric positive definite.
        col_factor: M, [i, i], symmetric positive definite.
        scale: [o, i]; zeros mask weights out.

    Returns:
        Q x, [..., o, i], in the widest dtype of factors and scale (at least float32).

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: shapes or devices do not fit.
    """
    _check_factors(row_factor, col_factor, scale)
    checks.dense_floating(scale=scale, x=x)
    if x.shape[-2:] != scale.shape:
        raise ValueError(
            f"expected x of shape [..., o, i] = [..., {scale.shape[0]}, {scale.shape[1]}], got {list(x.shape)}"
        )


def _fake_kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> Tensor:
    return scale.new_empty(scale.shape, dtype=widened(row_factor.dtype, col_factor.dtype, scale.dtype))


@op(reference=reference.kron_diag, fake=_fake_kron_diag)
def kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Tensor, *, impl: str = "auto") -> Tensor:
    """The diagonal of a Kronecker-factored inverse: scale^2 * (diag P outer diag M).

    Args:
        row_factor: P, [o, o].
        col_factor: M, [i, i].
        scale: [o, i].

    Returns:
        [o, i], in the widest dtype of the three (at least float32).

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: shapes or devices do not fit.
    """
    _check_factors(row_factor, col_factor, scale)
