"""Masks of one bit per weight, applied to many tensors in one launch.

apply_masks_: t[i] = 0 where bit i of the packed mask is 0.

The weights are cut into tiles of BLOCK. A table on the device has a row for each tile of every tensor, (address of its
weights, address of its bits, number of weights up to the end of the tensor), so that one program handles one tile and
reads nothing else about the tensors. Tables are kept between calls: the next call with the same tensors copies nothing
from the host, which also makes it possible to capture it in a CUDA graph.

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

BLOCK = 4096
MAX_TABLES = 256  # kept at most; one is 24 bytes per BLOCK weights
ZEROS = {1: tl.int8, 2: tl.int16, 4: tl.int32, 8: tl.int64}  # by the bytes of a weight

_tables: dict[tuple, Tensor] = {}
_captured: list[Tensor] = []  # tables that a CUDA graph may read for as long as it lives


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
    if capturing() and any(key not in _tables for key in _groups(tensors, packed_masks)):
        return False, "a CUDA graph is being captured: call it once with these very tensors before"
    return True, ""


def apply_masks_(tensors: list[Tensor], packed_masks: list[Tensor]) -> None:
    """One launch for each device and width of element."""
    for key in _groups(tensors, packed_masks):
        device, width, _ = key
        table = _tables.get(key)
        if table is None:
            table = _tables[key] = _make_table(key)
        if capturing():
            _captured.append(table)
        with launch_on(device):
            apply_masks_kernel[(len(table),)](table, ZEROS[width], BLOCK)


def _groups(tensors: list[Tensor], packed_masks: list[Tensor]) -> list[tuple]:
    """A key (device, bytes of a weight, ((address, address of the mask, number of weights), ...)) for each launch."""
    groups: dict[tuple[torch.device, int], list] = {}
    for tensor, packed in zip(tensors, packed_masks, strict=True):
        if size := tensor.numel():
            place = tensor.device, tensor.element_size()
            groups.setdefault(place, []).append((tensor.data_ptr(), packed.data_ptr(), size))
    return [(*place, tuple(entries)) for place, entries in groups.items()]


def _make_table(key: tuple) -> Tensor:
    """Rows of tiles, int64 [tiles, 3], on the device when this returns."""
    device, width, entries = key
    rows = []
    for address, packed_address, size in entries:
        start = torch.arange(0, size, BLOCK)
        rows.append(torch.stack([address + width * start, packed_address + start // 8, size - start], dim=1))
    if len(_tables) >= MAX_TABLES:
        for used in {table.device for table in _tables.values() if table.is_cuda}:
            torch.cuda.synchronize(used)  # before memory that a launch may yet read is given away
        _tables.clear()
    table = torch.cat(rows).to(device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # other streams may read it, too
    return table
