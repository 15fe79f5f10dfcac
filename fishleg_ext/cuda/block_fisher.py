"""Launches csrc/block_fisher.cu."""

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.cuda import supports_block_size, supports_device

# A block is the work of a few warps: so few of them leave most of a GPU idle, and a matrix product does not.
FEW_BLOCKS = 32


def supports_block_gram_(
    gram: Tensor, grads: Tensor, alpha: float = 1.0, *, precision: str = "ieee"
) -> tuple[bool, str]:
    """Many blocks that fit into registers."""
    supported, reason = _supports(gram)
    if supported and len(gram) < FEW_BLOCKS < len(grads):
        return False, f"its CUDA C++ kernel is for many blocks, not for {len(gram)} blocks of {len(grads)} gradients"
    return supported, reason


def block_gram_(gram: Tensor, grads: Tensor, alpha: float = 1.0, *, precision: str = "ieee") -> None:
    """Always in the precision of gram, the best that may be asked for."""
    if gram.numel():
        torch.ops.fishleg_ext_cuda.block_gram_out(_readable(grads, gram.dtype), alpha, gram)


def supports_block_inverse(gram: Tensor, damping: float) -> tuple[bool, str]:
    """Blocks that fit into registers."""
    supported, reason = supports_device(gram)
    return supports_block_size(gram.shape[1], widened(gram.dtype)) if supported else (False, reason)


def block_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A few warps, or one, for each block."""
    inverse = torch.empty(gram.shape, dtype=widened(gram.dtype), device=gram.device)
    info = torch.zeros(gram.shape[0], dtype=torch.int32, device=gram.device)
    if gram.numel():
        torch.ops.fishleg_ext_cuda.block_inverse_out(gram.to(inverse.dtype).contiguous(), damping, inverse, info)
    return inverse, info


def supports_woodbury_update_(inverse: Tensor, grads: Tensor, num_grads: int) -> tuple[bool, str]:
    """Blocks that fit into registers."""
    return _supports(inverse)


def woodbury_update_(inverse: Tensor, grads: Tensor, num_grads: int) -> None:
    """Each block stays in registers for all of these gradients."""
    if inverse.numel():
        torch.ops.fishleg_ext_cuda.woodbury_update_out(_readable(grads, inverse.dtype), num_grads, inverse)


def _supports(target: Tensor) -> tuple[bool, str]:
    supported, reason = supports_device(target)
    if supported and not target.is_contiguous():
        return False, "its CUDA C++ kernel takes contiguous blocks"
    return supports_block_size(target.shape[1], target.dtype) if supported else (False, reason)


def _readable(grads: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradients as the kernel for a `dtype` reads them: narrow ones are widened there."""
    narrow = (torch.float32,) if dtype == torch.float64 else (torch.bfloat16, torch.float16)
    return grads if grads.dtype in narrow else grads.to(dtype)
