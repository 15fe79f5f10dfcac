"""Tells how much memory there is to work with."""

import os
from pathlib import Path

import torch

SHARE = 4  # of the memory that is free, one part in so many is taken for a chunk
MOST_ON_CPU = 2**30  # more makes nothing faster there


def free_bytes(device: torch.device) -> int | None:
    """Return the bytes that can be allocated now, caches of files among them; None where nothing tells."""
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):  # not on Linux
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # none of these on Windows
        return None


def chunk_bytes(device: torch.device) -> int:
    """Return the bytes that may be taken for what is computed at a time, by the memory that is free now."""
    free = free_bytes(device)
    share = MOST_ON_CPU if free is None else free // SHARE
    return share if device.type == "cuda" else min(share, MOST_ON_CPU)
