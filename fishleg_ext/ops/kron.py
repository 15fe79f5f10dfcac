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
    rows, cols = row_factor.shape[0], col_factor.shape[0]
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


@op(reference=reference.kron_mul, fake=_fake_kron_mul, kernels=("triton",))
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
    _check_product(x, row_factor, col_factor, scale)


def _check_product(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor]) -> None:
    rows, cols = _check_factors(row_factor, col_factor, scale)
    checks.dense_floating(row_factor=row_factor, x=x)
    if x.shape[-2:] != (rows, cols):
        raise ValueError(f"expected x of shape [..., o, i] = [..., {rows}, {cols}], got {list(x.shape)}")


def _fake_foreach_kron_mul(
    x: list[Tensor], row_factor: list[Tensor], col_factor: list[Tensor], scale: list[Optional[Tensor]]
) -> list[Tensor]:
    return [_fake_kron_mul(*one) for one in zip(x, row_factor, col_factor, scale, strict=True)]


@op(reference=reference.foreach_kron_mul, fake=_fake_foreach_kron_mul, kernels=("triton",))
def foreach_kron_mul(
    x: list[Tensor],
    row_factor: list[Tensor],
    col_factor: list[Tensor],
    scale: list[Optional[Tensor]],
    *,
    impl: str = "auto",
) -> list[Tensor]:
    """`kron_mul` of many parameters at once: on a GPU, small layers share a launch.

    While a CUDA graph is captured the reference runs, as its kernel's tables hold the addresses of one call.

    Args:
        x: each [..., o, i], floating point; sizes may differ.
        row_factor: of each, [o, o] or [o].
        col_factor: of each, [i, i].
        scale: of each, [o, i]; None is 1.

    Returns:
        Q x of each, as `kron_mul` gives it.

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: lengths, shapes or devices do not fit; the message says of which.
    """
    checks.same_length("x", x, "row_factor", row_factor)
    checks.same_length("x", x, "col_factor", col_factor)
    checks.same_length("x", x, "scale", scale)
    for index, one in enumerate(zip(x, row_factor, col_factor, scale, strict=True)):
        try:
            _check_product(*one)
        except (TypeError, ValueError) as error:  # noqa: PERF203
            raise type(error)(f"of parameter {index}: {error}") from None


def _fake_kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Optional[Tensor] = None) -> Tensor:
    shape = row_factor.shape[0], col_factor.shape[0]
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
