"""Implementations for CPUs: C++ (csrc/cpu_*.cpp) where it is built, else batched PyTorch.

"auto" takes them wherever no GPU kernel takes the arguments.
"""

import functools

from fishleg_ext.common.build import load_ops


def unavailable() -> str | None:
    """Why these cannot run here, whatever the arguments: they always can."""
    return None


@functools.cache
def not_loaded() -> str | None:
    """Why the compiled kernels are not here, or None if they are."""
    return load_ops("_cpu", "cpu", "the C++ kernels for CPUs are")
