"""Tells how much memory there is to work with."""

import contextlib
import os
from collections.abc import Iterator
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


def used_bytes(device: torch.device) -> int:
    """Return what PyTorch has allocated on a GPU, or the resident memory of this process; 0 where nothing tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status("VmRSS")


@contextlib.contextmanager
def peak_of(device: torch.device) -> Iterator[list[int]]:
    """Measure the most that was used within this block; the list has it at the end, 0 where nothing tells."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # not on Linux
            Path("/proc/self/clear_refs").write_text("5")  # begin the high-water mark anew
    yield found
    found.append(torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM"))


def _status(entry: str) -> int:
    """Bytes of an entry of Linux's status of this process."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines[entry].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return 0
