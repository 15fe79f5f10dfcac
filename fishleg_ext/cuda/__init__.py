"""Python side of the CUDA C++ kernels in csrc/, one file per op family: they allocate results and call private ops."""

import functools
import json
from importlib import machinery, resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

OLDEST = (8, 0)  # compute capability of the oldest GPU that kernels are compiled for


@functools.cache
def unavailable() -> str | None:
    """Why no CUDA C++ kernel can run here, or None if they can."""
    return not_loaded() or (None if torch.cuda.is_available() else "torch sees no GPU")


@functools.cache
def not_loaded() -> str | None:
    """Why the compiled kernels are not here, or None if they are."""
    package = Path(str(resources.files("fishleg_ext")))
    library = next((p for s in machinery.EXTENSION_SUFFIXES if (p := package / f"_kernels{s}").exists()), None)
    if library is None:
        return f"the CUDA part is not built: {build_record()['reason']}"
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"the CUDA part does not load: {error}"
    return None


def build_record() -> dict[str, Any]:
    """What was decided when the package was installed: {"cuda": bool, "reason": str}."""
    record = resources.files("fishleg_ext") / "build_record.json"
    if not record.is_file():
        return {"cuda": False, "reason": "nothing is recorded of how this was installed"}
    return json.loads(record.read_text())


def supports_device(tensor: Tensor) -> tuple[bool, str]:
    """Whether the kernels run on this tensor's device, and if not, why not."""
    if not tensor.is_cuda:
        return False, f"its CUDA C++ kernel takes tensors on a GPU, not on {tensor.device}"
    capability = torch.cuda.get_device_capability(tensor.device)
    reason = "CUDA C++ kernels are compiled for compute capability {}.{} and later, and {} has {}.{}"
    return capability >= OLDEST, reason.format(*OLDEST, tensor.device, *capability)


@functools.cache
def shared_bytes_per_block(device: torch.device) -> int:
    """The most shared memory that a kernel may ask for on a GPU, for one thread block."""
    return torch.ops.fishleg_ext_cuda.shared_bytes_per_block(device.index)
