"""Factors of inverses, for sweeps from the first column to the last."""

import torch
from torch import Tensor

LEAST_SIZE = 128  # of a triangle that is inverted by halves, in matrix products


def inverse_factor(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Compute upper triangular U with U^T U = matrix^-1, by one factorisation and one triangular inverse.

    With the order of rows and columns reversed the Cholesky factor of the matrix is R, matrix = R R^T with R upper
    triangular, and U = R^-1. The factorisation is in float64: an error of it counts as much as the condition of the
    matrix, one of the inverse as much as its root.

    Args:
        matrix: [K, B, B], symmetric positive definite.

    Returns:
        U [K, B, B] in the dtype of the matrix, and bool [K], False where it is not positive definite to rounding.
    """
    factor, info = torch.linalg.cholesky_ex(matrix.flip(1, 2).double())
    return _inverse(factor.to(matrix.dtype).flip(1, 2)), info == 0


def _inverse(upper: Tensor) -> Tensor:
    """Invert upper triangular matrices [K, B, B]."""
    size = upper.shape[-1]
    if size <= LEAST_SIZE:
        identity = torch.eye(size, dtype=upper.dtype, device=upper.device).expand_as(upper)
        return torch.linalg.solve_triangular(upper, identity, upper=True)
    half = size // 2
    result = torch.zeros_like(upper)
    first = result[:, :half, :half] = _inverse(upper[:, :half, :half])
    last = result[:, half:, half:] = _inverse(upper[:, half:, half:])
    above = upper[:, :half, half:]
    # Nothing is multiplied by the quarter of each triangle that is zero.
    split = half // 2
    above = torch.cat([above[..., :split] @ last[:, :split, :split], above @ last[..., split:]], dim=2)
    above = torch.cat([first[:, :split] @ above, first[:, split:, split:] @ above[:, split:]], dim=1)
    result[:, :half, half:] = -above
    return result
