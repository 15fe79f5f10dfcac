"""Reads MNIST."""

import gzip
from pathlib import Path

import torch
from torch import Tensor

HELD_OUT = 55_000  # the first training image that settings are chosen on; the images before are trained on


def images(folder: Path, kind: str) -> Tensor:
    """Images of kind "train" or "t10k", uint8 [N, 1, 28, 28]."""
    return _read(folder / f"{kind}-images-idx3-ubyte.gz")[16:].view(-1, 1, 28, 28)


def labels(folder: Path, kind: str) -> Tensor:
    """Their digits, int64 [N]."""
    return _read(folder / f"{kind}-labels-idx1-ubyte.gz")[8:].long()


def _read(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(gzip.decompress(path.read_bytes())), dtype=torch.uint8)
