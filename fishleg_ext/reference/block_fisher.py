"""Blocks of the empirical Fisher matrix and their inverses."""

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.reference.batches import block_slices

MAX_RAISES = 12


def block_gram_(gram: Tensor, grads: Tensor, alpha: float = 1.0, *, precision: str = "ieee") -> None:
    """`precision` is the least that is asked for; this always computes in the dtype of `gram`."""
    grads = grads.to(gram.dtype)
    gram.baddbmm_(grads.permute(1, 2, 0), grads.permute(1, 0, 2), alpha=alpha)


def block_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Cholesky inverse of each damped block."""
    inverse = torch.empty_like(gram, dtype=widened(gram.dtype), memory_format=torch.contiguous_format)
    info = torch.zeros(gram.shape[0], dtype=torch.int32, device=gram.device)
    workspace = 4 * gram[:1].numel() * inverse.element_size()  # damped, its factor, that inverted, both halves added
    for part in block_slices(gram.shape[0], workspace, gram.device):
        factor, info[part] = damped_cholesky(gram[part].to(inverse.dtype), damping)
        half = torch.cholesky_inverse(factor)
        torch.add(half, half.mT, out=inverse[part]).mul_(0.5)
    inverse[info < 0] = torch.nan
    return inverse, info


def woodbury_update_(inverse: Tensor, grads: Tensor, num_grads: int) -> None:
    """One rank-one update of each inverse for each gradient."""
    for grad in grads.to(inverse.dtype):  # [K, B]
        step = (inverse @ grad[..., None])[..., 0]
        weight = num_grads + (grad * step).sum(-1)
        inverse.baddbmm_((step / weight[:, None])[..., None], step[:, None, :], alpha=-1)


def damped_cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of `matrix` [K, B, B] + damping * I, damped more where that is not positive definite.

    Returns:
        factors [K, B, B] and info int32 [K], which is how often damping was raised tenfold; -1 where MAX_RAISES did
        not help or the block is not finite, and there the factor is the identity. A damping of 0 is first raised to
        eps * mean(diag).
    """
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor, status = torch.linalg.cholesky_ex(matrix + damping * identity if damping else matrix)
    info = torch.zeros_like(status, dtype=torch.int32)
    # The factorisation reads the lower triangle alone. A sum that is finite has no entry that is not, and is fast.
    if ((status != 0) | ~matrix.sum((1, 2)).isfinite()).any():
        finite = matrix.flatten(1).isfinite().all(1)
        failed = (status != 0) | ~finite
        eps = torch.finfo(matrix.dtype).eps
        first = 10 * damping if damping > 0 else eps * matrix.diagonal(dim1=1, dim2=2).mean(1)
        for raises in range(1, MAX_RAISES + 1):
            retry = (failed & finite).nonzero()[:, 0]
            if len(retry) == 0:
                break
            shift = torch.as_tensor(first, dtype=matrix.dtype, device=matrix.device)
            shift = shift.expand(len(matrix))[retry] * 10.0 ** (raises - 1)
            factor[retry], status = torch.linalg.cholesky_ex(matrix[retry] + shift[:, None, None] * identity)
            info[retry] = raises
            failed[retry] = status != 0
        info[failed] = -1
        factor[failed] = identity
    return factor, info
