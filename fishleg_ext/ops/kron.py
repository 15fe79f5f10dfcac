"""Kronecker-factored inverses: products and diagonal."""

from typing import Optional

from torch import Tensor

from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import kron as reference


def _check_factors(row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor]) -> tuple[int, int]:
    """Returns (o, i)."""
    checks.dense_floating(row_factor=row_factor, col_factor=col_factor)
    if row_factor.dim() not in (1, 2):
        raise ValueError(f"expected row_factor of shape [o, o] or [o], got {list(row_factor.shape)}")
    checks.dims("col_factor", col_factor, "[i, i]")
    rows, cols = len(row_factor), len(col_factor)
    if scale is not None:
        checks.dense_floating(col_factor=col_factor, scale=scale)
        checks.dims("scale", scale, "[o, i]")
        rows, cols = scale.shape
    if row_factor.dim() == 1:
        checks.shape("row_factor", row_factor, "[o]", (rows,))
    else:
        checks.shape("row_factor", row_factor, "[o, o]", (rows, rows))
    checks.shape("col_factor", col_factor, "[i, i]", (cols, cols))
    return rows, cols


def _fake_kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor] = None) -> Tensor:
    return x.new_empty(x.shape, dtype=reference.dtype_of(row_factor, col_factor, scale))


@op(reference=reference.kron_mul, fake=_fake_kron_mul)
def kron_mul(
    x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor] = None, *, impl: str = "auto"
) -> Tensor:
    """Multiply by a Kronecker-factored inverse: Q x = scale * (P (scale * x) M).

    McGowan et al., FishLeg Surgeon, arXiv 2412.02328.

    Args:
        x: [..., o, i], floating point.
        row_factor: P, [o, o], symmetric positive definite; or [o], its diagonal where it has no other entries.
        col_factor: M, [i, i], symmetric positive definite.
        scale: [o, i]; zeros mask weights out. None is 1.

    Returns:
        Q x, [..., o, i], in the widest dtype of factors and scale (at least float32).

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: shapes or devices do not fit.
    """
    rows, cols = _check_factors(row_factor, col_factor, scale)
    checks.dense_floating(row_factor=row_factor, x=x)
    if x.shape[-2:] != (rows, cols):
        raise ValueError(f"expected x of shape [..., o, i] = [..., {rows}, {cols}], got {list(x.shape)}")


def _fake_kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor] = None) -> Tensor:
    shape = len(row_factor), len(col_factor)
    return col_factor.new_empty(shape, dtype=reference.dtype_of(row_factor, col_factor, scale))


@op(reference=reference.kron_diag, fake=_fake_kron_diag)
def kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor] = None, *, impl: str = "auto") -> Tensor:
    """The diagonal of a Kronecker-factored inverse: scale^2 * (diag P outer diag M).

    Args:
        row_factor: P, [o, o]; or [o], its diagonal.
        col_factor: M, [i, i].
        scale: [o, i]. None is 1.

    Returns:
        [o, i], in the widest dtype of the three (at least float32).

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: shapes or devices do not fit.
    """
    _check_factors(row_factor, col_factor, scale)
