"""Python side of the CUDA C++ kernels in csrc/, one file per op family: they allocate results and call private ops."""

import functools
import importlib
import re

import torch
from torch import Tensor

from fishleg_ext.common.build import load_ops


@functools.cache
def unavailable() -> str | None:
    """Why no CUDA C++ kernel can run here, or None if they can."""
    if (reason := not_loaded()) is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    try:
        torch.ops.fishleg_ext_cuda.compute_capability(0)
    except RuntimeError as error:  # the driver is too old for the toolkit, say
        return f"the CUDA part cannot ask the GPU: {error}"
    return None


@functools.cache
def not_loaded() -> str | None:
    """Why the compiled kernels are not here, or None if they are."""
    return load_ops("_C", "cuda", "the CUDA part is")


def supports_device(tensor: Tensor) -> tuple[bool, str]:
    """Say whether the kernels run on this tensor's device, and if not, why not."""
    if not tensor.is_cuda:
        return False, f"its CUDA C++ kernel takes tensors on a GPU, not on {tensor.device}"
    capability, oldest = torch.cuda.get_device_capability(tensor.device), oldest_capability()
    reason = "CUDA C++ kernels were compiled for compute capability {}.{} and later, and {} has {}.{}"
    return capability >= oldest, reason.format(*oldest, tensor.device, *capability)


@functools.cache
def oldest_capability() -> tuple[int, int]:
    """The compute capability of the oldest GPU that the kernels were compiled for."""
    architectures = importlib.import_module("fishleg_ext._build").architectures
    return min((divmod(int(number), 10) for number in re.findall(r"\d+", architectures)), default=(0, 0))


def supports_block_size(size: int, dtype: torch.dtype) -> tuple[bool, str]:
    """Say whether the kernels that hold a block in registers take blocks of so many weights."""
    largest = largest_block(dtype)
    return size <= largest, (
        f"its CUDA C++ kernel holds a block in registers: up to {largest} weights in {dtype}, not {size}"
    )


@functools.cache
def largest_block(dtype: torch.dtype) -> int:
    """The most weights in a block that the kernels hold in registers."""
    return torch.ops.fishleg_ext_cuda.largest_block(dtype.itemsize)
