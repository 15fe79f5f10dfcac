"""Products with a Kronecker-factored inverse, Q = diag(scale) (P x M) diag(scale)."""

import torch
from torch import Tensor

from fishleg_ext.reference.precision import widened


def kron_mul(x: Tensor, row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> Tensor:
    """Two matrix products between two scalings."""
    dtype = kron_dtype(row_factor, col_factor, scale)
    scale = scale.to(dtype)
    return scale * (row_factor.to(dtype) @ (scale * x.to(dtype)) @ col_factor.to(dtype))


def kron_diag(row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> Tensor:
    """An outer product of two diagonals, scaled twice."""
    dtype = kron_dtype(row_factor, col_factor, scale)
    diagonal = torch.outer(row_factor.diagonal().to(dtype), col_factor.diagonal().to(dtype))
    return scale.to(dtype).square() * diagonal


def kron_dtype(row_factor: Tensor, col_factor: Tensor, scale: Tensor) -> torch.dtype:
    """The widest of the three, float32 at least."""
    factors = torch.promote_types(row_factor.dtype, col_factor.dtype)
    return widened(torch.promote_types(factors, scale.dtype))
