"""Masks of one bit per weight, applied to many tensors in one launch.

apply_masks_: t[i] = 0 where bit i of the packed mask is 0.

One program zeroes one tile of one tensor, whose weights and bits a table names (`kernels.tables`).

Bytes per weight: the kernel reads 1/8 of mask and no weight, and writes zeros to pruned weights alone. Memory moves
sectors of 32 bytes, of which hardly one is without a pruned weight at high sparsity: the width of a weight is written,
and read, too, where the hardware fills up sectors that are written in part. Invariants: the zeros are integers of the
width of a weight, all bits 0, which every dtype reads as zero; BLOCK is a multiple of 8, so that tiles begin at a whole
byte of the mask.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishleg_ext.kernels import capturing, launch_on, wrong_device
from fishleg_ext.kernels.tables import BLOCK, Key, is_kept, table_of

ZEROS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # by the bytes of a weight


@triton.jit
def apply_masks_kernel(table_ptr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Zero the pruned weights of one tile."""
    row_ptr = table_ptr + 3 * tl.program_id(0).to(tl.int64)
    tensor_ptr = tl.load(row_ptr).to(tl.pointer_type(DTYPE))
    packed_ptr = tl.load(row_ptr + 1).to(tl.pointer_type(tl.uint8))
    size = tl.load(row_ptr + 2)
    offsets = tl.arange(0, BLOCK)
    # Weights beyond the end count as kept.
    byte = tl.load(packed_ptr + offsets // 8, mask=offsets < size, other=255)
    pruned = ((byte >> (offsets % 8).to(tl.uint8)) & 1) == 0
    tl.store(tensor_ptr + offsets, tl.zeros([BLOCK], DTYPE), mask=pruned)


def supports_apply_masks_(tensors: list[Tensor], packed_masks: list[Tensor]) -> tuple[bool, str]:
    """Contiguous tensors on a GPU; during the capture of a CUDA graph those of an earlier call."""
    for index, (tensor, packed) in enumerate(zip(tensors, packed_masks, strict=True)):
        if (reason := wrong_device(tensor)) is not None:
            return False, reason
        if not (tensor.is_contiguous() and packed.is_contiguous()):
            return False, f"its Triton kernel takes contiguous tensors, and tensors[{index}] or its mask is not"
    if capturing() and not all(map(is_kept, _groups(tensors, packed_masks))):
        return False, "a CUDA graph is being captured: call it once with these very tensors before"
    return True, ""


def apply_masks_(tensors: list[Tensor], packed_masks: list[Tensor]) -> None:
    """One launch for each device and width of element."""
    for key in _groups(tensors, packed_masks):
        device, (advance, _), _ = key
        table = table_of(key)
        with launch_on(device):
            apply_masks_kernel[(len(table),)](table, ZEROS[advance // BLOCK], BLOCK)


def _groups(tensors: list[Tensor], packed_masks: list[Tensor]) -> list[Key]:
    """A table for each device and width of element."""
    groups: dict[tuple[torch.device, int], list] = {}
    for tensor, packed in zip(tensors, packed_masks, strict=True):
        if size := tensor.numel():
            place = tensor.device, tensor.element_size()
            groups.setdefault(place, []).append((tensor.data_ptr(), packed.data_ptr(), size))
    return [(device, (width * BLOCK, BLOCK // 8), tuple(entries)) for (device, width), entries in groups.items()]
