"""Codes of 0 to 8 bits, of another width in each group: packed, unpacked, and turned into weights.

All four kernels walk over the weights alike. A program handles a tile of GROUPS x BLOCK weights: BLOCK weights of each
of GROUPS groups where groups are small, else one CHUNK of one group. What differs from group to group, its width and
where its codes and its values begin, is read once a tile. Without a mask the position of a weight in its group says
where its code lies; with one it is its rank among the kept, which is the number of kept weights in the chunks before
it (`ranks`, from the host) and a prefix sum over the bits of the mask within the tile. A code lies in one byte or two.

Bytes per weight: width / 8 of codes and, under a mask, 1/8 of mask are read, and a byte (unpack_codes) or a weight is
written; tables of values stay in caches. pack_codes sets bits by atomic "or" in 32-bit words, whose order does not
matter, after these were set to zero.

assign_codes: a program compares the weights of a tile with all boundaries of its group, for their codes, and then adds
up h and h w over those between two neighbouring boundaries, CODES intervals at a time; torch adds up the tiles, in
float64, so that the sums do not depend on the order in which programs run. Weight and importance are read once from
memory, and ceil(C / CODES) times more from a cache, a byte of code is written, and 8 C bytes of sums for each tile.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.kernels import launch_on, wrong_device
from fishleg_ext.reference.quantize import CHUNK

TILE = 512  # weights of a program, where groups are small
ASSIGN_BLOCK, ASSIGN_BLOCKS, ASSIGN_CODES = 128, 16, 8


@triton.jit
def _tile(
    bits_ptr,
    offsets_ptr,
    mask_ptr,
    ranks_ptr,
    numel,
    group_size,
    num_groups,
    chunks,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Of a tile: group, width and first byte of its codes, [GROUPS, 1]; index, kept, first bit of a weight's code."""
    program = tl.program_id(0).to(tl.int64)
    group = (program // chunks) * GROUPS + tl.arange(0, GROUPS)[:, None]
    chunk = program % chunks
    inside = chunk * LENGTH + tl.arange(0, BLOCK)[None, :]
    index = group * group_size + inside
    there = group < num_groups
    width = tl.load(bits_ptr + group, mask=there, other=0).to(tl.int64)
    offset = tl.load(offsets_ptr + group, mask=there, other=0)
    real = there & (inside < group_size) & (index < numel)
    if MASKED:
        byte = tl.load(mask_ptr + index // 8, mask=real, other=0)
        kept = real & (((byte >> (index % 8).to(tl.uint8)) & 1) != 0)
        before = tl.load(ranks_ptr + group * chunks + chunk, mask=there, other=0)
        rank = (before + tl.cumsum(kept.to(tl.int32), axis=1) - 1).to(tl.int64)
    else:
        kept = real
        rank = inside + tl.zeros_like(index)
    return group, there, width, offset, index, real, kept, rank * width


@triton.jit
def _codes(packed_ptr, num_bytes, offset, width, kept, bit):
    """Read the code of each kept weight, 0 elsewhere; what lies beyond the packed bytes is 0."""
    place = offset + bit // 8
    read = kept & (width > 0) & (place >= 0)
    shift = bit % 8
    low = tl.load(packed_ptr + place, mask=read & (place < num_bytes), other=0).to(tl.int32)
    high = tl.load(packed_ptr + place + 1, mask=read & (shift + width > 8) & (place + 1 < num_bytes), other=0).to(
        tl.int32
    )
    return ((low | (high << 8)) >> shift.to(tl.int32)) & ((1 << width.to(tl.int32)) - 1)


@triton.jit
def pack_codes_kernel(
    codes_ptr,
    words_ptr,
    num_words,
    bits_ptr,
    offsets_ptr,
    mask_ptr,
    ranks_ptr,
    numel,
    group_size,
    num_groups,
    chunks,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Set the bits of the codes of one tile in words of 32 bits, which are 0 before."""
    _, _, width, offset, index, _, kept, bit = _tile(
        bits_ptr,
        offsets_ptr,
        mask_ptr,
        ranks_ptr,
        numel,
        group_size,
        num_groups,
        chunks,
        MASKED,
        GROUPS,
        BLOCK,
        LENGTH,
    )
    code = tl.load(codes_ptr + index, mask=kept, other=0).to(tl.int64) & ((1 << width) - 1)
    first = 8 * offset + bit
    shifted = code << (first % 32)  # of at most 39 bits
    word = first // 32
    written = kept & (width > 0) & (first >= 0) & (word < num_words)
    tl.atomic_or(words_ptr + word, (shifted & 0xFFFFFFFF).to(tl.int32), mask=written, sem="relaxed")
    spills = written & (first % 32 + width > 32) & (word + 1 < num_words)
    tl.atomic_or(words_ptr + word + 1, (shifted >> 32).to(tl.int32), mask=spills, sem="relaxed")


@triton.jit
def unpack_codes_kernel(
    packed_ptr,
    num_bytes,
    codes_ptr,
    bits_ptr,
    offsets_ptr,
    mask_ptr,
    ranks_ptr,
    numel,
    group_size,
    num_groups,
    chunks,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Write the codes of one tile, a byte each."""
    _, _, width, offset, index, real, kept, bit = _tile(
        bits_ptr,
        offsets_ptr,
        mask_ptr,
        ranks_ptr,
        numel,
        group_size,
        num_groups,
        chunks,
        MASKED,
        GROUPS,
        BLOCK,
        LENGTH,
    )
    tl.store(codes_ptr + index, _codes(packed_ptr, num_bytes, offset, width, kept, bit).to(tl.uint8), mask=real)


@triton.jit
def dequantize_fixed_point_kernel(
    packed_ptr,
    num_bytes,
    weight_ptr,
    scale_ptr,
    bits_ptr,
    offsets_ptr,
    mask_ptr,
    ranks_ptr,
    numel,
    group_size,
    num_groups,
    chunks,
    HALF: tl.constexpr,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Write the weights of one tile."""
    group, there, width, offset, index, real, kept, bit = _tile(
        bits_ptr,
        offsets_ptr,
        mask_ptr,
        ranks_ptr,
        numel,
        group_size,
        num_groups,
        chunks,
        MASKED,
        GROUPS,
        BLOCK,
        LENGTH,
    )
    code = _codes(packed_ptr, num_bytes, offset, width, kept, bit)
    middle = (1 << width.to(tl.int32)) // 2
    scale = tl.load(scale_ptr + group, mask=there, other=0.0).to(tl.float32)
    level = (code - middle).to(tl.float32)
    if HALF:
        level += 0.5
    value = tl.where(kept, scale * level, 0.0)
    tl.store(weight_ptr + index, value.to(weight_ptr.dtype.element_ty), mask=real)


@triton.jit
def dequantize_codebook_kernel(
    packed_ptr,
    num_bytes,
    weight_ptr,
    codebook_ptr,
    starts_ptr,
    num_values,
    bits_ptr,
    offsets_ptr,
    mask_ptr,
    ranks_ptr,
    numel,
    group_size,
    num_groups,
    chunks,
    MASKED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Write the weights of one tile; what is beyond the codebook is NaN."""
    group, there, width, offset, index, real, kept, bit = _tile(
        bits_ptr,
        offsets_ptr,
        mask_ptr,
        ranks_ptr,
        numel,
        group_size,
        num_groups,
        chunks,
        MASKED,
        GROUPS,
        BLOCK,
        LENGTH,
    )
    code = _codes(packed_ptr, num_bytes, offset, width, kept, bit)
    entry = tl.load(starts_ptr + group, mask=there, other=0) + code
    value = tl.load(codebook_ptr + entry, mask=kept & (entry >= 0) & (entry < num_values), other=float("nan"))
    tl.store(weight_ptr + index, tl.where(kept, value, 0.0), mask=real)


@triton.jit
def assign_codes_kernel(
    weight_ptr,
    importance_ptr,
    boundaries_ptr,
    codes_ptr,
    partial_ptr,
    size,
    tiles,
    num_codes,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    CODES: tl.constexpr,
):
    """Codes of one tile of a group, and its sums of h and h w for each code."""
    program = tl.program_id(0).to(tl.int64)
    group = program // tiles
    first = (program % tiles) * (BLOCK * BLOCKS)
    weight_ptr += group * size
    importance_ptr += group * size
    codes_ptr += group * size
    boundaries_ptr += group * (num_codes - 1)
    partial_ptr += program * 2 * num_codes
    for block in range(BLOCKS):
        index = first + block * BLOCK + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + index, mask=index < size, other=0.0).to(tl.float32)
        code = tl.zeros([BLOCK], tl.int32)
        for boundary in range(num_codes - 1):
            code += (weight > tl.load(boundaries_ptr + boundary)).to(tl.int32)
        tl.store(codes_ptr + index, code.to(tl.uint8), mask=index < size)
    for start in range(0, num_codes, CODES):
        value = start + tl.arange(0, CODES)
        below = tl.load(boundaries_ptr + value - 1, mask=(value > 0) & (value < num_codes), other=0.0)
        above = tl.load(boundaries_ptr + value, mask=value < num_codes - 1, other=float("inf"))
        total = tl.zeros([CODES], tl.float32)
        product = tl.zeros([CODES], tl.float32)
        for block in range(BLOCKS):
            index = first + block * BLOCK + tl.arange(0, BLOCK)
            weight = tl.load(weight_ptr + index, mask=index < size, other=0.0).to(tl.float32)[:, None]
            importance = tl.load(importance_ptr + index, mask=index < size, other=0.0).to(tl.float32)[:, None]
            # As many boundaries below as the code says; NaN is above none.
            mine = ((value[None, :] == 0) | (weight > below[None, :])) & ~(weight > above[None, :])
            mine = mine & (index < size)[:, None]
            total += tl.sum(tl.where(mine, importance, 0.0), axis=0)
            product += tl.sum(tl.where(mine, importance * weight, 0.0), axis=0)
        tl.store(partial_ptr + 2 * value, total, mask=value < num_codes)
        tl.store(partial_ptr + 2 * value + 1, product, mask=value < num_codes)


def _supports(*arguments: Any) -> tuple[bool, str]:
    """Contiguous tensors on a GPU."""
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if (reason := wrong_device(tensors[0])) is not None:
        return False, reason
    if not all(tensor.is_contiguous() for tensor in tensors):
        return False, "its Triton kernel takes contiguous tensors, and one is not"
    return True, ""


supports_pack_codes = supports_unpack_codes = supports_dequantize_codebook = _supports


def supports_dequantize_fixed_point(
    packed: Tensor, bits: Tensor, offsets: Tensor, scale: Tensor, *rest: Any
) -> tuple[bool, str]:
    """Contiguous tensors on a GPU, of scales of at most 32 bits."""
    if scale.dtype == torch.float64:
        return False, "its Triton kernel computes in float32, not float64"
    return _supports(packed, bits, offsets, scale, *rest)


def _launch(kernel, device, numel, group_size, bits, offsets, packed_mask, ranks, *, first, constants=()):
    """Launch a kernel of tiles; `first` are the arguments that are its own."""
    groups = len(bits)
    chunks = triton.cdiv(group_size, CHUNK)
    block = min(CHUNK, triton.next_power_of_2(group_size))
    per_program = max(1, TILE // block) if chunks == 1 else 1
    if numel == 0:
        return
    # Without a mask any address stands for it: nothing is read.
    mask, ranks = (bits, bits) if packed_mask is None else (packed_mask, ranks)
    with launch_on(device):
        kernel[(triton.cdiv(groups, per_program) * chunks,)](
            *first,
            bits,
            offsets,
            mask,
            ranks,
            numel,
            group_size,
            groups,
            chunks,
            *constants,
            packed_mask is not None,
            per_program,
            block,
            CHUNK,
        )


def pack_codes(
    codes: Tensor,
    bits: Tensor,
    offsets: Tensor,
    num_bytes: int,
    group_size: int,
    packed_mask: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Set bits in words of 32, of which the last may be cut off."""
    words = torch.zeros((num_bytes + 3) // 4, dtype=torch.int32, device=codes.device)
    layout = codes.numel(), group_size, bits, offsets, packed_mask, ranks
    _launch(pack_codes_kernel, codes.device, *layout, first=(codes, words, words.numel()))
    return words.view(torch.uint8)[:num_bytes].clone()


def unpack_codes(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    numel: int,
    group_size: int,
    packed_mask: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """One launch."""
    codes = torch.empty(numel, dtype=torch.uint8, device=packed.device)
    layout = numel, group_size, bits, offsets, packed_mask, ranks
    _launch(unpack_codes_kernel, packed.device, *layout, first=(packed, packed.numel(), codes))
    return codes


def dequantize_fixed_point(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    scale: Tensor,
    half: bool,
    shape: list[int],
    group_size: int,
    packed_mask: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """One launch."""
    weight = torch.empty(shape, dtype=scale.dtype, device=packed.device)
    layout = weight.numel(), group_size, bits, offsets, packed_mask, ranks
    first = packed, packed.numel(), weight, scale
    _launch(dequantize_fixed_point_kernel, packed.device, *layout, first=first, constants=(half,))
    return weight


def dequantize_codebook(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    codebook: Tensor,
    starts: Tensor,
    shape: list[int],
    group_size: int,
    packed_mask: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """One launch."""
    weight = torch.empty(shape, dtype=codebook.dtype, device=packed.device)
    layout = weight.numel(), group_size, bits, offsets, packed_mask, ranks
    first = packed, packed.numel(), weight, codebook, starts, codebook.numel()
    _launch(dequantize_codebook_kernel, packed.device, *layout, first=first)
    return weight


def supports_assign_codes(weight: Tensor, importance: Tensor, boundaries: Tensor) -> tuple[bool, str]:
    """Contiguous tensors of at most 32 bits on a GPU."""
    if torch.float64 in (weight.dtype, importance.dtype, boundaries.dtype):
        return False, "its Triton kernel computes in float32, not float64"
    return _supports(weight, importance, boundaries)


def assign_codes(weight: Tensor, importance: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """One launch, and the sum over tiles."""
    (groups, size), num_codes = weight.shape, boundaries.shape[1] + 1
    tiles = triton.cdiv(size, ASSIGN_BLOCK * ASSIGN_BLOCKS)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    partial = torch.empty(groups, tiles, num_codes, 2, dtype=torch.float32, device=weight.device)
    boundaries = boundaries.to(torch.float32)
    if groups * tiles:
        with launch_on(weight.device):
            assign_codes_kernel[(groups * tiles,)](
                weight,
                importance,
                boundaries,
                codes,
                partial,
                size,
                tiles,
                num_codes,
                ASSIGN_BLOCK,
                ASSIGN_BLOCKS,
                ASSIGN_CODES,
            )
    return codes, partial.sum(1, dtype=torch.float64).to(widened(weight.dtype, importance.dtype))
