"""Tells how much memory there is to work with."""

import os

import torch

SHARE = 4  # of the memory that is free, one part in so many is taken for a chunk
MOST_ON_CPU = 2**30  # more makes nothing faster there


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes that may be taken for what is computed at a time, by the memory that is free now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // SHARE
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # none of these on Windows
        return MOST_ON_CPU
    return min(free // SHARE, MOST_ON_CPU)
