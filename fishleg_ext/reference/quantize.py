"""Codes of different widths, packed bit by bit; see `ops.quantize`."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.reference.batches import CPU_BYTES
from fishleg_ext.reference.masks import pack_mask, unpack_mask

MAX_BITS = 8
CHUNK = 1024  # weights of a group, under a mask, among which a kernel counts the kept by itself


def offsets_of(bits: Tensor, numel: int, group_size: int, mask: Tensor | None = None) -> tuple[Tensor, int]:
    """Compute where the packed codes of each group begin.

    Args:
        bits: uint8 [G].
        numel: weights, n.
        group_size: weights in a group.
        mask: bool [n], True = kept; None keeps all.

    Returns:
        offsets int64 [G], in bytes, and how many bytes all groups take.

    Examples:
        >>> offsets_of(torch.tensor([3, 8, 1], dtype=torch.uint8), 9, 4)
        (tensor([0, 2, 6]), 7)
    """
    sizes = kept_counts(numel, group_size, mask, bits.device) * bits.long()
    ends = ((sizes + 7) // 8).cumsum(0)
    offsets = torch.nn.functional.pad(ends, (1, 0))
    return offsets[:-1].clone(), int(offsets[-1])


def kept_counts(numel: int, group_size: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Count the kept weights of each group, int64 [G]."""
    groups = -(-numel // group_size)
    if mask is None:
        counts = torch.full((groups,), group_size, device=device)
        counts[-1:] -= groups * group_size - numel
        return counts
    padded = torch.nn.functional.pad(mask.reshape(-1), (0, groups * group_size - numel))
    return padded.view(groups, group_size).sum(1)


def chunk_ranks(mask: Tensor, group_size: int) -> Tensor:
    """Count the kept weights of each group before each CHUNK of its weights, int32 [G, ceil(group_size / CHUNK)].

    Args:
        mask: bool [n], True = kept.
        group_size: weights in a group.

    Examples:
        >>> chunk_ranks(torch.ones(5000, dtype=torch.bool), 4096)
        tensor([[   0, 1024, 2048, 3072],
                [   0,  904,  904,  904]], dtype=torch.int32)
    """
    groups, chunks = -(-mask.numel() // group_size), -(-group_size // CHUNK)
    padded = torch.nn.functional.pad(mask.reshape(-1), (0, groups * group_size - mask.numel()))
    padded = torch.nn.functional.pad(padded.view(groups, group_size), (0, chunks * CHUNK - group_size))
    counts = padded.view(groups, chunks, CHUNK).sum(2)
    return (counts.cumsum(1) - counts).to(torch.int32)


def pack_codes(
    codes: Tensor,
    bits: Tensor,
    offsets: Tensor,
    num_bytes: int,
    group_size: int,
    packed_mask: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Scatter the bits of all codes, and put eight of them into a byte."""
    stream = torch.zeros(8 * num_bytes, dtype=torch.bool, device=codes.device)
    for part, width, position, kept in _parts(codes.numel(), bits, offsets, group_size, packed_mask):
        for bit in range(MAX_BITS):
            written = kept & (bit < width) & (position >= 0) & (position + bit < len(stream))
            stream[(position + bit)[written]] = (codes[part][written] >> bit & 1).bool()
    return pack_mask(stream)


def unpack_codes(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    numel: int,
    group_size: int,
    packed_mask: Tensor | None = None,
    ranks: Tensor | None = None,
) -> Tensor:
    """Gather the two bytes in which each code may lie, and cut it out."""
    codes = torch.zeros(numel, dtype=torch.uint8, device=packed.device)
    end = packed.numel()
    padded = torch.nn.functional.pad(packed, (0, 2))  # what lies beyond is 0
    for part, width, position, kept in _parts(numel, bits, offsets, group_size, packed_mask):
        place = position // 8
        place = torch.where(place < 0, end, place.clamp(max=end))
        both = padded[place].to(torch.int32) | padded[place + 1].to(torch.int32) << 8
        code = both >> (position % 8).to(torch.int32) & (1 << width.to(torch.int32)) - 1
        codes[part] = torch.where(kept, code, 0).to(torch.uint8)
    return codes


def _parts(
    numel: int, bits: Tensor, offsets: Tensor, group_size: int, packed_mask: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yield for some weights at a time which they are, and of each its width, first bit and whether it is kept."""
    mask = None if packed_mask is None else unpack_mask(packed_mask, [numel])
    before = torch.zeros((), dtype=torch.int64, device=bits.device)  # kept weights before this part
    first = None if mask is None else _kept_before_groups(mask, group_size)
    step = CPU_BYTES // 64
    for start in range(0, numel, step):
        part = slice(start, min(start + step, numel))
        index = torch.arange(part.start, part.stop, device=bits.device)
        group = index // group_size
        if mask is None or first is None:
            kept, rank = torch.ones_like(index, dtype=torch.bool), index % group_size
        else:
            kept = mask[part]
            rank = before + kept.cumsum(0) - 1 - first[group]
            before = before + kept.sum()
        width = bits[group]
        yield part, width, 8 * offsets[group] + rank * width, kept


def _kept_before_groups(mask: Tensor, group_size: int) -> Tensor:
    counts = kept_counts(mask.numel(), group_size, mask, mask.device)
    return counts.cumsum(0) - counts


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
    """Compute scale * (code - floor(2^bits / 2) [+ 1/2]), in float32 at least."""
    numel, dtype = math.prod(shape), widened(scale.dtype)
    codes = unpack_codes(packed, bits, offsets, numel, group_size, packed_mask)
    group = torch.arange(numel, device=bits.device) // group_size
    level = codes.to(dtype) - ((1 << bits.long()) // 2).to(dtype)[group] + (0.5 if half else 0.0)
    return _masked((scale.to(dtype)[group] * level).to(scale.dtype), shape, packed_mask)


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
    """Gather from the codebook."""
    numel = math.prod(shape)
    codes = unpack_codes(packed, bits, offsets, numel, group_size, packed_mask)
    group = torch.arange(numel, device=bits.device) // group_size
    index = starts[group] + codes
    beyond = (index < 0) | (index >= codebook.numel())
    padded = torch.nn.functional.pad(codebook, (0, 1), value=torch.nan)
    return _masked(padded[torch.where(beyond, codebook.numel(), index)], shape, packed_mask)


def _masked(weight: Tensor, shape: list[int], packed_mask: Tensor | None) -> Tensor:
    weight = weight.reshape(shape)
    return weight if packed_mask is None else weight.masked_fill(~unpack_mask(packed_mask, shape), 0)


def assign_codes(weight: Tensor, importance: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    """Search each weight among the boundaries; sums in float64."""
    dtype = widened(weight.dtype, importance.dtype)
    common = torch.promote_types(weight.dtype, boundaries.dtype)  # in which both are exact
    codes = torch.searchsorted(boundaries.to(common).contiguous(), weight.to(common).contiguous())
    codes = torch.where(weight.isnan(), 0, codes)
    terms = torch.stack([importance.double(), importance.double() * weight.double()], dim=2)
    sums = terms.new_zeros(weight.shape[0], boundaries.shape[1] + 1, 2)
    sums.scatter_add_(1, codes[..., None].expand(-1, -1, 2), terms)
    return codes.to(torch.uint8), sums.to(dtype)
