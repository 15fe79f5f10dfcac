"""Products with a Kronecker-factored inverse, Q = diag(scale) (P x M) diag(scale)."""

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened


def dtype_of(row_factor: Tensor, col_factor: Tensor, scale: Tensor | None) -> torch.dtype:
    """Dtype of products and diagonals."""
    return widened(row_factor.dtype, col_factor.dtype, *([] if scale is None else [scale.dtype]))


def kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor | None = None) -> Tensor:
    """Two matrix products between two scalings."""
    dtype = dtype_of(row_factor, col_factor, scale)
    row, x = row_factor.to(dtype), x.to(dtype)
    if scale is not None:
        x = scale.to(dtype) * x
    product = (row @ x if row.dim() == 2 else row[:, None] * x) @ col_factor.to(dtype)
    return (product if scale is None else scale.to(dtype) * product).contiguous()


def foreach_kron_mul(
    x: list[Tensor], row_factor: list[Tensor], col_factor: list[Tensor], scale: list[Tensor | None]
) -> list[Tensor]:
    """One after the other."""
    return [kron_mul(*one) for one in zip(x, row_factor, col_factor, scale, strict=True)]


def kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Tensor | None = None) -> Tensor:
    """An outer product of two diagonals, scaled twice."""
    dtype = dtype_of(row_factor, col_factor, scale)
    row = row_factor.diagonal() if row_factor.dim() == 2 else row_factor
    diagonal = torch.outer(row.to(dtype), col_factor.diagonal().to(dtype))
    return diagonal if scale is None else (scale.to(dtype).square() * diagonal).contiguous()
