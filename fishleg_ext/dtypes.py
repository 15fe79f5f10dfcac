"""Which dtype sums are taken in."""

import functools

import torch


def widened(*dtypes: torch.dtype) -> torch.dtype:
    """The widest of these dtypes, or float32 where all are narrower.

    >>> widened(torch.bfloat16)
    torch.float32
    """
    return functools.reduce(torch.promote_types, dtypes, torch.float32)
