"""How many blocks are worked on at once."""

from collections.abc import Iterator

import torch

# Workspace: enough that the steps of an elimination, on all these blocks at once, are not bound by Python.
CPU_BYTES = 2**26
GPU_BYTES = 2**30


def block_slices(num_blocks: int, bytes_per_block: int, device: torch.device) -> Iterator[slice]:
    """Slices of the blocks, each with a workspace of bounded size."""
    budget = CPU_BYTES if device.type == "cpu" else GPU_BYTES
    step = max(1, budget // max(1, bytes_per_block))
    for start in range(0, num_blocks, step):
        yield slice(start, min(start + step, num_blocks))
