"""Codes for one parameter: the grids that methods choose among, fitted to its groups of weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.quantization import fixed_point, kmeans
from fishleg_ext.quantization.kmeans import boundaries_of, fit_codebook
from fishleg_ext.quantization.packed import QuantizedTensor

LEAST = 1e-30  # importance of weights in groups in which none costs anything


@dataclass(frozen=True)
class Groups:
    """A parameter cut into groups, which are the rows of all tensors here.

    Attributes:
        layout: of the matrix in groups.
        weight: [G, N], 0 where pruned and in the padding.
        importance: [G, N], 0 there too.
        kept: bool [G, N], False there.
        masked: whether there is a mask, under which zero needs no code.
    """

    layout: BlockLayout
    weight: Tensor
    importance: Tensor
    kept: Tensor
    masked: bool

    @classmethod
    def of(cls, matrix: Tensor, importance: Tensor, mask: Tensor | None, group_size: int) -> "Groups":
        """Cut a matrix."""
        layout = BlockLayout(tuple(matrix.shape), group_size)
        kept = layout.is_weight(matrix.device)
        if mask is not None:
            kept = kept & layout.to_blocks(mask)
        weight, importance = (layout.to_blocks(x.float()) for x in (matrix, importance))
        # A group in which no weight costs anything keeps its values, as far as bits go.
        importance = torch.where((kept & (importance > 0)).any(1, keepdim=True), importance, LEAST)
        weight, importance = (torch.where(kept, x, 0) for x in (weight, importance))
        return cls(layout, weight, importance, kept, mask is not None)

    @property
    def counts(self) -> Tensor:
        """Weights that have codes, int64 [G]."""
        return self.kept.sum(1)

    def codebook(self, bits: int, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return the codebook of 2^bits values of some groups, [rows, 2^bits]."""
        weight, importance, kept = self.weight[rows], self.importance[rows], self.kept[rows]
        has_zero = False if self.masked else (kept & (weight == 0)).any(1)
        values = fit_codebook(weight, importance, 1 << bits, with_zero=has_zero)
        values[:, 0] = torch.where(values[:, 0].isinf(), 0, values[:, 0])  # of groups without weights
        return values

    def fixed_point(self, bits: int, rows: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Return the scale of some groups, [rows], and its distortion, [rows]."""
        return fixed_point.fit_scale(self.weight[rows], self.importance[rows], bits, self.masked)

    def distortions(self, grid: str, most: int) -> Tensor:
        """Measure the distortion of each group with 0 to `most` bits, [G, most + 1]."""
        if grid == "codebook":
            return kmeans.distortions(self.weight, self.importance, most)
        return torch.stack([self.fixed_point(bits)[1] for bits in range(most + 1)], dim=1)


@dataclass(frozen=True)
class Grid:
    """What the weights of a parameter may become: codebooks, or fixed-point numbers.

    Attributes:
        bits: uint8 [G].
        values: [G, C], the codebook of each group, ascending, filled up with +inf; None of fixed-point numbers.
        scale: float32 [G], the step of fixed-point numbers; None of codebooks.
        half: whether their levels lie half a step beside whole multiples of it.
        boundaries: [G, C - 1], between the weights of neighbouring codes of codebooks; None is in the middle.
    """

    bits: Tensor
    values: Tensor | None = None
    scale: Tensor | None = None
    half: bool = False
    boundaries: Tensor | None = None

    @classmethod
    def fitted(cls, groups: Groups, grid: str, bits: Tensor) -> "Grid":
        """Fit a codebook or a scale to each group with its bits."""
        count = len(groups.weight)
        scale = torch.zeros(count, device=bits.device)
        values = torch.full((count, 1 << int(bits.max()) if count else 1), torch.inf, device=bits.device)
        for width in bits.unique().tolist():
            rows = (bits == width).nonzero()[:, 0]
            if grid == "codebook":
                values[rows, : 1 << width] = groups.codebook(width, rows)
            else:
                scale[rows] = groups.fixed_point(width, rows)[0]
        return cls(bits, values) if grid == "codebook" else cls(bits, scale=scale, half=groups.masked)

    @classmethod
    def of_values(cls, values: Tensor, boundaries: Tensor) -> "Grid":
        """Make a grid of one group from its codebook [C]; see `boundaries`, [C - 1]."""
        width = max(0, (len(values) - 1).bit_length())
        bits = torch.tensor([width], dtype=torch.uint8, device=values.device)
        return cls(bits, values[None], boundaries=boundaries[None])

    def table(self) -> Tensor:
        """Return the values of each group, [G, C], ascending, filled up with +inf."""
        if self.values is not None:
            return self.values
        assert self.scale is not None
        return fixed_point.table_of(self.scale, self.bits, self.half)

    @classmethod
    def of_tensor(cls, tensor: QuantizedTensor) -> "Grid":
        """Return the grid of a packed parameter."""
        if tensor.scale is not None:
            return cls(tensor.bits, scale=tensor.scale, half=tensor.half)
        assert tensor.codebook is not None
        if len(tensor.bits) == 1:
            return cls(tensor.bits, tensor.codebook[None])
        sizes = 1 << tensor.bits.long()
        values = torch.full((len(sizes), int(sizes.max())), torch.inf, device=sizes.device)
        inside = torch.arange(values.shape[1], device=sizes.device) < sizes[:, None]
        values[inside] = tensor.codebook
        # The room that a codebook did not need was filled with its last value, after values that ascend.
        fill = torch.zeros_like(inside)
        fill[:, 1:] = values[:, 1:] <= values[:, :-1]
        return cls(tensor.bits, values.masked_fill(fill.cummax(1).values, torch.inf))

    def between(self) -> Tensor:
        """Return what separates the weights of neighbouring codes of codebooks, [G, C - 1]."""
        assert self.values is not None
        return boundaries_of(self.values) if self.boundaries is None else self.boundaries

    def codes_of(self, weight: Tensor) -> Tensor:
        """Return the code of each weight, uint8 [G, N]."""
        if self.values is not None:
            return ops.assign_codes(weight, torch.ones_like(weight), self.between())[0]
        assert self.scale is not None
        return fixed_point.codes_of(weight, self.scale, self.bits, self.half).to(torch.uint8)

    def weights(self, codes: Tensor) -> Tensor:
        """Return what codes [G, N] stand for."""
        if self.values is not None:
            return self.values.gather(1, codes.long())
        assert self.scale is not None
        return fixed_point.values_of(codes.float(), self.scale, self.bits, self.half)

    def of_table(self, index: Tensor, group: Tensor) -> Tensor:
        """Return codes, given indices into the tables of their groups."""
        if self.scale is None:
            return index
        last = ((1 << self.bits.long()) - 1)[group]
        return torch.where((self.scale < 0)[group], last - index.long(), index.long()).to(torch.uint8)

    def quantized(self, codes: Tensor, groups: Groups, orientation: Orientation, dtype: torch.dtype) -> QuantizedTensor:
        """Pack a parameter, given the codes [n] of its matrix."""
        kept = groups.kept.reshape(-1)[: groups.layout.numel].contiguous() if groups.masked else None
        codebook = None
        if self.values is not None:
            # The codebook of one group may end before 2^bits; those of several have room for all.
            finite = self.values.isfinite()
            last = torch.where(finite, self.values, -torch.inf).amax(1, keepdim=True)
            room = torch.arange(self.values.shape[1], device=last.device) < (1 << self.bits.long())[:, None]
            codebook = torch.where(finite, self.values, last)[finite if len(self.bits) == 1 else room]
        return QuantizedTensor.of_codes(
            codes.reshape(-1)[: groups.layout.numel],
            kept,
            self.bits,
            orientation=orientation,
            dtype=dtype,
            group_size=groups.layout.block_size,
            scale=self.scale,
            half=self.half,
            codebook=codebook,
        )
