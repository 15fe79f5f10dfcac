"""Codes of 1 to 8 bits, of another width in each group of weights: assign them, pack them, look up their values.

A tensor of n weights, in row-major order, is cut into G = ceil(n / group_size) groups of consecutive weights, the last
of which may be shorter. Group g has codes of `bits[g]` bits, 0 to 8, and the codes of its weights, or where there is a
mask of its kept weights alone, lie one after the other from byte `offsets[g]` on, the lowest bit first, filled up to a
whole byte. `offsets_of` computes where groups begin, `chunk_ranks` what kernels need to find a code under a mask.
"""

from typing import Optional

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.ops.masks import check_packed
from fishleg_ext.reference import quantize as reference
from fishleg_ext.reference.quantize import CHUNK, MAX_BITS, chunk_ranks, kept_counts, offsets_of

__all__ = [
    "CHUNK",
    "MAX_BITS",
    "assign_codes",
    "chunk_ranks",
    "dequantize_codebook",
    "dequantize_fixed_point",
    "kept_counts",
    "offsets_of",
    "pack_codes",
    "unpack_codes",
]


def _check_layout(
    bits: Tensor, offsets: Tensor, numel: int, group_size: int, packed_mask: Tensor | None, ranks: Tensor | None
) -> None:
    """Check what says where the codes of each group lie."""
    if group_size < 1:
        raise ValueError(f"expected group_size >= 1, got {group_size}")
    groups = -(-numel // group_size)
    for name, tensor, dtype in (("bits", bits, torch.uint8), ("offsets", offsets, torch.int64)):
        if tensor.dtype != dtype:
            raise TypeError(f"expected {name} of dtype {dtype}, got {tensor.dtype}")
        checks.shape(name, tensor, f"[G], one for each group of {group_size} of {numel} weights,", (groups,))
    if (packed_mask is None) != (ranks is None):
        raise ValueError("expected both packed_mask and ranks, or neither; chunk_ranks computes ranks")
    if packed_mask is not None and ranks is not None:
        check_packed("packed_mask", packed_mask, [numel])
        if ranks.dtype != torch.int32:
            raise TypeError(f"expected ranks of dtype torch.int32, got {ranks.dtype}")
        checks.shape("ranks", ranks, "[G, chunks]", (groups, -(-group_size // CHUNK)))
        checks.same_device(bits=bits, packed_mask=packed_mask, ranks=ranks)
    checks.same_device(bits=bits, offsets=offsets)


def _check_bytes(name: str, codes: Tensor, bits: Tensor) -> None:
    if codes.dtype != torch.uint8:
        raise TypeError(f"expected {name} of dtype torch.uint8, got {codes.dtype}")
    if codes.dim() != 1:
        raise ValueError(f"expected {name} of one dimension, got shape {list(codes.shape)}")
    checks.same_device(**{name: codes, "bits": bits})


def _fake_pack_codes(
    codes: Tensor, bits: Tensor, offsets: Tensor, num_bytes: int, group_size: int, *masks: Tensor | None
) -> Tensor:
    return codes.new_empty(num_bytes)


@op(reference=reference.pack_codes, fake=_fake_pack_codes, kernels=("triton",))
def pack_codes(
    codes: Tensor,
    bits: Tensor,
    offsets: Tensor,
    num_bytes: int,
    group_size: int,
    packed_mask: Optional[Tensor] = None,
    ranks: Optional[Tensor] = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Pack codes of different widths; those of pruned weights are left out.

    Args:
        codes: uint8 [n]; of each only the lowest bits, as many as its group has.
        bits: uint8 [G], the width of the codes of each group, 0 to 8.
        offsets: int64 [G], the byte at which each group begins, as `offsets_of` returns them.
        num_bytes: of all groups together; what would lie beyond is left out.
        group_size: weights in a group.
        packed_mask: uint8 [ceil(n / 8)] of `pack_mask`, True = kept. None keeps all.
        ranks: int32 [G, ceil(group_size / CHUNK)] of `chunk_ranks`, with a mask.

    Returns:
        packed uint8 [num_bytes].

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes or devices do not fit.

    Examples:
        >>> codes, bits = torch.tensor([1, 2, 3, 0], dtype=torch.uint8), torch.tensor([2, 4], dtype=torch.uint8)
        >>> offsets, num_bytes = offsets_of(bits, 4, 2)
        >>> pack_codes(codes, bits, offsets, num_bytes, 2)
        tensor([9, 3], dtype=torch.uint8)
    """
    _check_bytes("codes", codes, bits)
    _check_layout(bits, offsets, codes.numel(), group_size, packed_mask, ranks)
    if num_bytes < 0:
        raise ValueError(f"expected num_bytes >= 0, got {num_bytes}")


def _fake_unpack_codes(
    packed: Tensor, bits: Tensor, offsets: Tensor, numel: int, group_size: int, *masks: Tensor | None
) -> Tensor:
    return packed.new_empty(numel)


@op(reference=reference.unpack_codes, fake=_fake_unpack_codes, kernels=("triton",))
def unpack_codes(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    numel: int,
    group_size: int,
    packed_mask: Optional[Tensor] = None,
    ranks: Optional[Tensor] = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """The inverse of `pack_codes`.

    Args:
        packed: uint8 [bytes]; what lies beyond reads as 0.
        bits, offsets, group_size, packed_mask, ranks: as they were packed.
        numel: weights, n.

    Returns:
        codes uint8 [n], 0 where pruned and in groups of 0 bits.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes or devices do not fit.
    """
    _check_bytes("packed", packed, bits)
    _check_layout(bits, offsets, numel, group_size, packed_mask, ranks)


def _fake_dequantize_fixed_point(
    packed: Tensor, bits: Tensor, offsets: Tensor, scale: Tensor, half: bool, shape: list[int], *rest: object
) -> Tensor:
    return scale.new_empty(shape)


@op(reference=reference.dequantize_fixed_point, fake=_fake_dequantize_fixed_point, kernels=("triton",))
def dequantize_fixed_point(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    scale: Tensor,
    half: bool,
    shape: list[int],
    group_size: int,
    packed_mask: Optional[Tensor] = None,
    ranks: Optional[Tensor] = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Compute weights from packed codes of fixed-point numbers: scale * (code - floor(2^bits / 2) [+ 1/2]).

    Args:
        packed, bits, offsets, group_size, packed_mask, ranks: see `pack_codes`.
        scale: [G], the step of each group, floating point; it may be negative.
        half: whether levels lie half a step beside whole multiples of it, so that none of them is zero.
        shape: of the weights.

    Returns:
        weight of this shape in the dtype of scale, exactly 0 where pruned.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes or devices do not fit.
    """
    numel = _numel(shape)
    _check_bytes("packed", packed, bits)
    _check_layout(bits, offsets, numel, group_size, packed_mask, ranks)
    checks.dense_floating(scale=scale)
    checks.shape("scale", scale, "[G]", bits.shape)
    checks.same_device(scale=scale, bits=bits)


def _fake_dequantize_codebook(
    packed: Tensor, bits: Tensor, offsets: Tensor, codebook: Tensor, starts: Tensor, shape: list[int], *rest: object
) -> Tensor:
    return codebook.new_empty(shape)


@op(reference=reference.dequantize_codebook, fake=_fake_dequantize_codebook, kernels=("triton",))
def dequantize_codebook(
    packed: Tensor,
    bits: Tensor,
    offsets: Tensor,
    codebook: Tensor,
    starts: Tensor,
    shape: list[int],
    group_size: int,
    packed_mask: Optional[Tensor] = None,
    ranks: Optional[Tensor] = None,
    *,
    impl: str = "auto",
) -> Tensor:
    """Look up the values of packed codes: codebook[starts[g] + code].

    Args:
        packed, bits, offsets, group_size, packed_mask, ranks: see `pack_codes`.
        codebook: [values of all groups], floating point.
        starts: int64 [G], where the values of each group begin; groups may share them.
        shape: of the weights.

    Returns:
        weight of this shape in the dtype of codebook, exactly 0 where pruned. A code beyond the end of the codebook
        is NaN.

    Raises:
        TypeError: a tensor has another dtype.
        ValueError: shapes or devices do not fit.
    """
    numel = _numel(shape)
    _check_bytes("packed", packed, bits)
    _check_layout(bits, offsets, numel, group_size, packed_mask, ranks)
    checks.dense_floating(codebook=codebook)
    checks.dims("codebook", codebook, "[values]")
    if starts.dtype != torch.int64:
        raise TypeError(f"expected starts of dtype torch.int64, got {starts.dtype}")
    checks.shape("starts", starts, "[G]", bits.shape)
    checks.same_device(codebook=codebook, starts=starts, bits=bits)


def _fake_assign_codes(weight: Tensor, importance: Tensor, boundaries: Tensor) -> tuple[Tensor, Tensor]:
    codes = weight.new_empty(weight.shape, dtype=torch.uint8)
    shape = weight.shape[0], boundaries.shape[1] + 1, 2
    return codes, weight.new_empty(shape, dtype=widened(weight.dtype, importance.dtype))


@op(reference=reference.assign_codes, fake=_fake_assign_codes, kernels=("triton",))
def assign_codes(
    weight: Tensor, importance: Tensor, boundaries: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Find the interval that each weight lies in, and add up the weights of each interval: one step of k-means.

    Args:
        weight: w, [G, N], floating point; a row is a group.
        importance: h, [G, N], floating point, >= 0. Weights of importance 0 have codes too.
        boundaries: [G, C - 1], ascending along each row, in any floating-point dtype, 1 <= C <= 256.

    Returns:
        codes uint8 [G, N], how many boundaries are below the weight (0 for NaN), and sums [G, C, 2], of h and of h w
        over the weights of each code, in the wider dtype of weight and importance (at least float32).

    Raises:
        TypeError: a tensor is not dense and floating point.
        ValueError: shapes or devices do not fit, or there are more than 256 codes.
    """
    checks.dense_floating(weight=weight, importance=importance, boundaries=boundaries)
    checks.dims("weight", weight, "[G, N]")
    checks.shape("importance", importance, "[G, N]", weight.shape)
    checks.dims("boundaries", boundaries, "[G, C - 1]")
    checks.shape("boundaries", boundaries, "[G, C - 1]", (weight.shape[0], boundaries.shape[1]))
    if boundaries.shape[1] >= 2**MAX_BITS:
        raise ValueError(f"expected at most {2**MAX_BITS - 1} boundaries, got {boundaries.shape[1]}")


def _numel(shape: list[int]) -> int:
    numel = 1
    for size in shape:
        numel *= size
    return numel
