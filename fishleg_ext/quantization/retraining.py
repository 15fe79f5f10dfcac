"""Retraining of quantized weights by a straight-through gradient.

The model computes with quantized weights. Each has a real-valued weight behind it, which takes the step that the
optimizer makes with the gradient at the quantized one, and after each step its code is chosen anew. Codebooks and
scales follow the weights: they are the best for the codes of now. Codes that are entropy-coded cost their bits: the
price of a bit rises as long as they have more entropy than they began with.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor, nn

from fishleg_ext import ops
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.quantization import fixed_point
from fishleg_ext.quantization.entropy import boundaries_of_least_cost, entropy
from fishleg_ext.quantization.fitting import Grid, Groups
from fishleg_ext.quantization.packed import QuantizedTensor

GAIN = 0.1  # of the price of a bit, for each bit that the codes have too many
DECAY = 0.9  # of the price after each step at which they have fewer
SETTLING = 1e-3  # by how much it rises at least, at the end


@dataclass
class Trained:
    """One parameter that is retrained.

    Attributes:
        parameter: of the model, which holds quantized weights.
        orientation: how it is seen as a matrix.
        groups: the real-valued weights behind it, in groups.
        grid: what they may become.
        codes: uint8 [G, N], of now.
        written: what the parameter was set to last.
    """

    parameter: nn.Parameter
    orientation: Orientation
    groups: Groups
    grid: Grid
    codes: Tensor
    written: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter, tensor: QuantizedTensor, importance: Tensor) -> "Trained":
        """Begin where the quantized weights are.

        Args:
            parameter: of the model.
            tensor: its codes.
            importance: [G, N], of the weights in groups.
        """
        tensor = tensor.to(parameter.device)
        matrix = tensor.orientation.to_matrix(parameter.detach())
        mask = tensor.mask()
        shaped = None if mask is None else mask.view(matrix.shape)
        groups = Groups.of(matrix, torch.ones_like(matrix), shaped, tensor.group_size)
        # Where no gradient was seen a weight counts a little.
        known = importance.to(parameter.device)
        groups = replace(groups, importance=torch.where(groups.kept, known.clamp(min=float(known.mean()) * 1e-6), 0))
        codes = groups.layout.to_blocks(tensor.codes().view(groups.layout.shape))
        return cls(parameter, tensor.orientation, groups, Grid.of_tensor(tensor), codes, parameter.detach().clone())

    def step(self, refit: bool, price: float | None = None) -> None:
        """Move the real-valued weights by the step of the optimizer, and quantize them again.

        Args:
            refit: move the codebook or scale to the best for the codes of now.
            price: of a bit of entropy-coded codes, in squared distances between neighbouring values; None is of codes
                of fixed length.
        """
        groups, layout = self.groups, self.groups.layout
        step = self.orientation.to_matrix(self.parameter.detach() - self.written)
        moved = torch.where(groups.kept, groups.weight + layout.to_blocks(step), 0)
        self.groups = groups = replace(groups, weight=moved)
        if price is not None:
            self._set_boundaries(price)
        self._requantize(refit)
        weight = torch.where(groups.kept, self.grid.weights(self.codes), 0)
        matrix = layout.from_blocks(weight)
        self.parameter.copy_(self.orientation.to_parameter(matrix).to(self.parameter.dtype))
        self.written.copy_(self.parameter)

    def packed(self) -> QuantizedTensor:
        """Return the codes of now."""
        return self.grid.quantized(self.codes, self.groups, self.orientation, self.parameter.dtype)

    def entropy(self) -> tuple[float, int]:
        """Return the bits that all codes take when they are entropy-coded, and how many codes there are."""
        codes = self.codes[self.groups.kept]
        return entropy(codes) * len(codes), len(codes)

    def _set_boundaries(self, price: float) -> None:
        """Choose codes by their bits, too, without those that no weight has."""
        assert self.grid.values is not None
        values = self.grid.values[0]
        counts = torch.bincount(self.codes[self.groups.kept].long(), minlength=len(values))
        # In their order, which a zero that stays zero may have left.
        values, index = values[counts > 0].unique(return_inverse=True)
        counts = counts.new_zeros(len(values)).index_add_(0, index, counts[counts > 0])
        if len(values) > 1:
            price = price * float(values.diff().median()) ** 2
            self.grid = Grid.of_values(values, boundaries_of_least_cost(values, counts, price))

    def _requantize(self, refit: bool) -> None:
        """Choose the codes, and the grid of least distortion for them."""
        weight, h, grid = self.groups.weight, self.groups.importance, self.grid
        if grid.values is not None:
            between = grid.between()
            self.codes, sums = ops.assign_codes(weight, h, between)
            if refit:
                # A code that no weight has stays in its interval, so that values ascend.
                least, most = (nn.functional.pad(between, pad, value=x) for pad, x in (((1, 0), -inf), ((0, 1), inf)))
                kept = grid.values.clamp(least, most)
                means = torch.where(sums[..., 0] > 0, sums[..., 1] / sums[..., 0], kept)
                if not self.groups.masked:  # where zero is a code it stays one
                    means = torch.where(grid.values == 0, 0, means)
                self.grid = replace(grid, values=means.to(grid.values.dtype))
            return
        assert grid.scale is not None
        self.codes = grid.codes_of(weight)
        if refit:
            level = fixed_point.values_of(self.codes.float(), torch.ones_like(grid.scale), grid.bits, grid.half)
            squares, products = (h * level.square()).sum(1), (h * level * weight).sum(1)
            self.grid = replace(grid, scale=torch.where(squares > 0, products / squares, grid.scale))


class PriceOfBits:
    """What a bit of the codes costs, such that those of all parameters together keep to an entropy."""

    def __init__(self, trained: Collection[Trained]) -> None:
        self._trained, self.value = trained, 0.0
        self.most = self._entropy()

    def follow(self) -> None:
        """After a step, raise or lower the price."""
        excess = self._entropy() - self.most
        self.value = self.value + GAIN * excess if excess > 0 else DECAY * self.value

    def settle(self, refit: bool) -> None:
        """Raise the price until the codes keep to their entropy."""
        while (excess := self._entropy() - self.most) > 0:
            self.value += max(GAIN * excess, SETTLING)
            for trained in self._trained:
                trained.step(refit, self.value)

    def _entropy(self) -> float:
        """Return the mean over all codes."""
        spent = [trained.entropy() for trained in self._trained]
        return sum(bits for bits, _ in spent) / max(1, sum(count for _, count in spent))
