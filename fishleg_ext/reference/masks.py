"""Masks of one bit per weight: bit j of byte i is entry 8 i + j, in row-major order."""

import math

import torch
from torch import Tensor


def pack_mask(mask: Tensor) -> Tensor:
    """Eight entries to a byte, the last byte filled up with zeros."""
    flat = mask.reshape(-1).to(torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (flat << _bits(mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(packed: Tensor, shape: list[int]) -> Tensor:
    """A byte to eight entries."""
    bits = packed[:, None] & (1 << _bits(packed.device)) != 0
    return bits.reshape(-1)[: math.prod(shape)].reshape(shape)


def apply_masks_(tensors: list[Tensor], packed_masks: list[Tensor]) -> None:
    """NaN and inf at pruned entries become zero too."""
    for tensor, packed in zip(tensors, packed_masks, strict=True):
        tensor.masked_fill_(~unpack_mask(packed, list(tensor.shape)), 0)


def _bits(device: torch.device) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
