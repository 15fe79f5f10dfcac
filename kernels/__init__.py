"""Triton kernels, one file per op family, installed as `fishleg_ext.kernels`.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run interpreted, on CPU tensors: slow, and
meant for checking them where there is no GPU.
"""

import contextlib
import functools

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@functools.cache  # asked at every call
def unavailable() -> str | None:
    """Why no Triton kernel can run here, or None if they can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 in the environment runs Triton kernels interpreted, on the CPU)"


def wrong_device(tensor: Tensor) -> str | None:
    """Why Triton kernels do not run on this tensor's device, or None if they do."""
    if tensor.is_cpu if INTERPRETED else tensor.is_cuda:
        return None
    wanted = "on the CPU, because Triton is interpreted" if INTERPRETED else "on a GPU"
    return f"its Triton kernel takes tensors {wanted}, not on {tensor.device}"


def capturing() -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def launch_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
