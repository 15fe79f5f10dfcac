"""Gram matrices and inverses of blocks on a CPU: in C++ (csrc/cpu_block_fisher.cpp) where that is built."""

import torch
from torch import Tensor

from fishleg_ext import cpu
from fishleg_ext.common.dtypes import widened
from fishleg_ext.reference import block_fisher as reference

# Where the half of the product that is spared takes longer than its mirror image, as measured.
LEAST_GRADIENTS, LEAST_SIZE = 32, 64
FEW_LARGE = 512  # size of blocks that LAPACK inverts with several threads


def supports_block_gram_(
    gram: Tensor, grads: Tensor, alpha: float = 1.0, *, precision: str = "ieee"
) -> tuple[bool, str]:
    """Tensors on a CPU."""
    return gram.device.type == "cpu", f"its CPU implementation takes tensors on a CPU, not on {gram.device}"


def block_gram_(gram: Tensor, grads: Tensor, alpha: float = 1.0, *, precision: str = "ieee") -> None:
    """Compute one half of each matrix, and mirror it; both by PyTorch where there is little to spare."""
    few = len(grads) < LEAST_GRADIENTS or gram.shape[1] < LEAST_SIZE
    if few or cpu.not_loaded() is not None or not gram.is_contiguous():
        reference.block_gram_(gram, grads, alpha, precision=precision)
    else:
        torch.ops.fishleg_ext_cpu.block_gram_out(grads.to(gram.dtype), alpha, gram)


def supports_block_inverse(gram: Tensor, damping: float) -> tuple[bool, str]:
    """Tensors on a CPU."""
    return gram.device.type == "cpu", f"its CPU implementation takes tensors on a CPU, not on {gram.device}"


def block_inverse(gram: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Sweep each block; those that need more damping are left to the reference, and so are few large ones."""
    if cpu.not_loaded() is not None or not is_faster_in_cpp(gram):
        return reference.block_inverse(gram, damping)
    gram = gram.to(widened(gram.dtype)).contiguous()
    inverse, inverted = swept(gram, damping)
    info = torch.zeros(len(gram), dtype=torch.int32)
    if not inverted.all():
        inverse[~inverted], info[~inverted] = reference.block_inverse(gram[~inverted], damping)
    return inverse, info


def is_faster_in_cpp(matrices: Tensor) -> bool:
    """Tell whether [K, B, B] are inverted faster in C++, by one thread each, than by LAPACK with all threads.

    With one thread it is about twice as fast, as measured.
    """
    return matrices.shape[1] < FEW_LARGE or 2 * len(matrices) >= torch.get_num_threads()


def swept(matrices: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Invert contiguous matrices [K, B, B] in C++, and tell which have an inverse, bool [K]; others are not written."""
    inverse, inverted = torch.empty_like(matrices), torch.empty(len(matrices), dtype=torch.bool)
    torch.ops.fishleg_ext_cpu.block_inverse_out(matrices, damping, inverse, inverted)
    return inverse, inverted
