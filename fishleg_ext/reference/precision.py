"""Which dtype sums are taken in, and how many blocks are worked on at once."""

from collections.abc import Iterator

import torch


def widened(dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or float32 where it is narrower.

    >>> widened(torch.bfloat16)
    torch.float32
    """
    return torch.promote_types(dtype, torch.float32)


def batches(num_blocks: int, bytes_per_block: int, device: torch.device) -> Iterator[slice]:
    """Slices of the blocks whose workspace stays in the last-level cache of a CPU, or below 1 GiB on a GPU."""
    budget = 2**24 if device.type == "cpu" else 2**30
    step = max(1, budget // max(1, bytes_per_block))
    for start in range(0, num_blocks, step):
        yield slice(start, min(start + step, num_blocks))
