"""How many blocks are worked on at once."""

from collections.abc import Iterator

import torch

from fishleg_ext.common.memory import chunk_bytes

# Workspace on a CPU: enough that the steps of an elimination, on all these blocks at once, are not bound by Python.
CPU_BYTES = 2**26


def block_slices(num_blocks: int, bytes_per_block: int, device: torch.device) -> Iterator[slice]:
    """Slices of the blocks, each with a workspace of bounded size: on a GPU by its free memory, to occupy all of it."""
    budget = chunk_bytes(device) if device.type == "cuda" else CPU_BYTES
    step = max(1, budget // max(1, bytes_per_block))
    for start in range(0, num_blocks, step):
        yield slice(start, min(start + step, num_blocks))
