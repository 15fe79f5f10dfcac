"""Triton kernels, one file per op family, installed as `fishleg_ext.kernels`.

With TRITON_INTERPRET=1 in the environment before Triton is imported they run interpreted, on CPU tensors: slow, and
meant for checking them where there is no GPU.
"""

import contextlib

import torch
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret


def unavailable() -> str | None:
    """Why no Triton kernel can run here, or None if they can."""
    if INTERPRETED or torch.cuda.is_available():
        return None
    return "torch sees no GPU (TRITON_INTERPRET=1 in the environment runs Triton kernels interpreted, on the CPU)"


def supports_device(tensor: Tensor) -> tuple[bool, str]:
    """Whether Triton kernels run on this tensor's device, and if not, why not."""
    wanted = "cpu" if INTERPRETED else "cuda"
    where = "on the CPU, because Triton is interpreted," if INTERPRETED else "on a GPU,"
    return tensor.device.type == wanted, f"its Triton kernel takes tensors {where} not on {tensor.device}"


def launch_on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it this one."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
