"""Chooses the dtype that sums are taken in, and how their products are rounded."""

import contextlib
import functools
from collections.abc import Iterator

import torch


@functools.cache
def widened(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of these dtypes, or float32 where all are narrower.

    Examples:
        >>> widened(torch.bfloat16)
        torch.float32
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


@contextlib.contextmanager
def ieee_products() -> Iterator[None]:
    """Matrix products of float32 on a GPU in float32 proper, though the user may allow TF32 for a network.

    What is left of an inverse is a small difference of large numbers: three decimal digits do not do.
    """
    setting = torch.backends.cuda.matmul
    before = setting.fp32_precision
    if before != "tf32":
        yield
        return
    setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        setting.fp32_precision = before
