"""A parameter as packed codes, with all that turns them into weights again."""

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.ops.quantize import chunk_ranks, offsets_of
from fishleg_ext.quantization.entropy import counts_of


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """One parameter: codes of each group of consecutive weights of its matrix [out, fan-in], and their values.

    Attributes:
        orientation: how the parameter is seen as a matrix.
        dtype: of the parameter.
        group_size: weights in a group; the last group may be shorter.
        bits: uint8 [G], the width of the codes of each group, 0 to 8.
        packed: uint8, the codes of the kept weights (`ops.pack_codes`).
        packed_mask: uint8 (`ops.pack_mask`), True = kept, in the order of the matrix; None where all are.
        scale: float32 [G] of fixed-point numbers, None of codebooks.
        half: whether their levels lie half a step beside whole multiples of the scale.
        codebook: float32, the values of one group after the other, None of fixed-point numbers. A group of b bits has
            2^b; a single group may have fewer.
    """

    orientation: Orientation
    dtype: torch.dtype
    group_size: int
    bits: Tensor
    packed: Tensor
    packed_mask: Tensor | None = None
    scale: Tensor | None = None
    half: bool = False
    codebook: Tensor | None = None

    @classmethod
    def of_codes(cls, codes: Tensor, mask: Tensor | None, bits: Tensor, **fields: Any) -> "QuantizedTensor":
        """Pack the codes uint8 [n] of a matrix; mask bool [n], True = kept."""
        group_size = fields["group_size"]
        offsets, num_bytes = offsets_of(bits, codes.numel(), group_size, mask)
        masks = () if mask is None else (ops.pack_mask(mask), chunk_ranks(mask, group_size))
        packed = ops.pack_codes(codes.reshape(-1).contiguous(), bits, offsets, num_bytes, group_size, *masks)
        return cls(bits=bits, packed=packed, packed_mask=masks[0] if masks else None, **fields)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the parameter."""
        return self.orientation.shape

    @property
    def numel(self) -> int:
        """Weights, the pruned among them."""
        return math.prod(self.shape)

    @functools.cached_property
    def _layout(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Offsets of the groups; mask and ranks where there is a mask."""
        mask = self.mask()
        offsets, num_bytes = offsets_of(self.bits, self.numel, self.group_size, mask)
        if num_bytes != self.packed.numel():
            raise ValueError(f"expected {num_bytes} bytes of codes, got {self.packed.numel()}")
        if mask is None or self.packed_mask is None:
            return offsets, ()
        return offsets, (self.packed_mask, chunk_ranks(mask, self.group_size))

    @functools.cached_property
    def _starts(self) -> Tensor:
        sizes = 1 << self.bits.long()
        return sizes.cumsum(0) - sizes

    def check(self) -> None:
        """Raise ValueError unless there are as many bytes of codes as there should be."""
        _ = self._layout

    def mask(self) -> Tensor | None:
        """Return which weights of the matrix are kept, bool [n], or None where all are."""
        return None if self.packed_mask is None else ops.unpack_mask(self.packed_mask, [self.numel])

    def codes(self) -> Tensor:
        """Return the codes of the matrix, uint8 [n], 0 where pruned."""
        offsets, masks = self._layout
        return ops.unpack_codes(self.packed, self.bits, offsets, self.numel, self.group_size, *masks)

    def kept_codes(self) -> Tensor:
        """Return the codes of the weights that have one, uint8."""
        codes, mask = self.codes(), self.mask()
        return codes if mask is None else codes[mask]

    def counts(self) -> Tensor:
        """Return how many weights have each code, int64 [C]."""
        return counts_of(self.kept_codes())

    def unpack(self) -> Tensor:
        """Return the weights, in the shape and dtype of the parameter."""
        offsets, masks = self._layout
        layout: Any = (list(self.orientation.matrix_shape), self.group_size, *masks)
        if self.scale is not None:
            weight = ops.dequantize_fixed_point(self.packed, self.bits, offsets, self.scale, self.half, *layout)
        else:
            assert self.codebook is not None
            weight = ops.dequantize_codebook(self.packed, self.bits, offsets, self.codebook, self._starts, *layout)
        return self.orientation.to_parameter(weight).to(self.dtype)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """Return the same on another device."""
        moved: dict[str, Any] = {
            n: x.to(device) for n, x in vars(self).items() if isinstance(x, Tensor) and not n.startswith("_")
        }
        return replace(self, **moved)
