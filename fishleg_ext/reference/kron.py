"""Products with a Kronecker-factored inverse, Q = diag(scale) (P x M) diag(scale)."""

import torch
from torch import Tensor

from fishleg_ext.dtypes import widened


def kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> Tensor:
    """Two matrix products between two scalings."""
    dtype = widened(row_factor.dtype, col_factor.dtype, scale.dtype)
    scale = scale.to(dtype)
    return (scale * (row_factor.to(dtype) @ (scale * x.to(dtype)) @ col_factor.to(dtype))).contiguous()


def kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> Tensor:
    """An outer product of two diagonals, scaled twice."""
    dtype = widened(row_factor.dtype, col_factor.dtype, scale.dtype)
    diagonal = torch.outer(row_factor.diagonal().to(dtype), col_factor.diagonal().to(dtype))
    return (scale.to(dtype).square() * diagonal).contiguous()
