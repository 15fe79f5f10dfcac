"""Retraining of quantized weights by a straight-through gradient.

The model computes with quantized weights. Each has a real-valued weight behind it, which takes the step that the
optimizer makes with the gradient at the quantized one, and after each step its code is chosen anew. Codebooks and
scales follow the weights: they are the best for the present codes. On a uniform grid, whose codes are entropy-coded, a
weight takes the code of least squared error plus a Lagrange multiplier times its bits (entropy-constrained
quantization), so that the entropy stays what it was.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext import ops
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.quantization import fixed_point
from fishleg_ext.quantization.entropy import boundaries_of_least_cost, counts_of, mean_entropy
from fishleg_ext.quantization.fitting import Grid, Groups
from fishleg_ext.quantization.packed import QuantizedTensor

DECAY = 0.9  # of the multiplier from step to step, as long as the codes keep to their entropy
GROWTH = 1.25  # of the multiplier, until they do
LEAST = 1e-3  # multiplier above 0: a boundary to a code twice as frequent moves by half a thousandth of the spacing


@dataclass
class Trained:
    """One parameter that is retrained.

    Attributes:
        parameter: of the model, which holds quantized weights.
        orientation: how it is seen as a matrix.
        groups: the real-valued weights behind it, in groups.
        grid: what they may become.
        codes: uint8 [G, N], at present.
        written: what the parameter was set to last.
        spacing: between most neighbouring values of the codebook of the whole parameter, at the beginning.
    """

    parameter: nn.Parameter
    orientation: Orientation
    groups: Groups
    grid: Grid
    codes: Tensor
    written: Tensor
    spacing: float = 0.0

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
        grid = Grid.of_tensor(tensor)
        spacing = 0.0
        if grid.values is not None and grid.values.shape[1] > 1:
            spacing = float(grid.values[0].sort().values.diff().median())
        return cls(parameter, tensor.orientation, groups, grid, codes, parameter.detach().clone(), spacing)

    def move(self) -> None:
        """Move the real-valued weights by the step of the optimizer."""
        step = self.orientation.to_matrix(self.parameter.detach() - self.written)
        moved = self.groups.weight + self.groups.layout.to_blocks(step)
        self.groups = replace(self.groups, weight=torch.where(self.groups.kept, moved, 0))

    def quantize(self, refit: bool) -> None:
        """Choose the codes, with `refit` then the codebook or scale of least distortion, and set the parameter."""
        self._choose(refit)
        weight, kept, layout = self.groups.weight, self.groups.kept, self.groups.layout
        values = torch.where(kept, self.grid.weights(self.codes), 0)
        matrix = layout.from_blocks(torch.where(weight.isnan(), weight, values))  # a loss that diverged shows
        self.parameter.copy_(self.orientation.to_parameter(matrix).to(self.parameter.dtype))
        self.written.copy_(self.parameter)

    def packed(self) -> QuantizedTensor:
        """Return the present codes."""
        return self.grid.quantized(self.codes, self.groups, self.orientation, self.parameter.dtype)

    def counts(self) -> Tensor:
        """Put the codebook of the whole parameter in order, and return how many weights have each code, int64 [C]."""
        assert self.grid.values is not None
        if (self.grid.values.diff() < 0).any():  # a zero that stays zero, or a code without weights, was overtaken
            values, order = self.grid.values.sort()
            self.grid = replace(self.grid, values=values)
            self.codes = order[0].argsort()[self.codes.long()].to(torch.uint8)
        return counts_of(self.codes[self.groups.kept], self.grid.table().shape[1])

    def constrain(self, counts: Tensor, multiplier: float) -> Tensor:
        """Set the boundaries between codes by what their bits cost, and return how many weights each would have.

        Args:
            counts: how many have it, [C]: its bits are those of this frequency.
            multiplier: what a bit costs, in squared spacings.
        """
        assert self.grid.values is not None
        values = self.grid.values[0]
        boundaries = boundaries_of_least_cost(values, counts, multiplier * self.spacing**2)
        self.grid = replace(self.grid, boundaries=boundaries[None])
        return counts_of(torch.bucketize(self.groups.weight[self.groups.kept], boundaries), len(values))

    def _choose(self, refit: bool) -> None:
        weight, h, grid = self.groups.weight, self.groups.importance, self.grid
        if grid.values is not None:
            self.codes, sums = ops.assign_codes(weight, h, grid.between())
            if refit:
                # A code that no weight has stays where it is.
                means = torch.where(sums[..., 0] > 0, sums[..., 1] / sums[..., 0], grid.values)
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


class Retraining:
    """The parameters that one optimizer trains, step by step.

    Attributes:
        trained: by name.
        refit: whether codebooks and scales follow.
        max_entropy: of the codes of all parameters, in bits on average; None is any.
        multiplier: of the bits, in squared spacings of each codebook. Steps of uniform grids are in proportion to
            1 / sqrt(importance), so that a bit costs the same loss in every parameter.
    """

    def __init__(self, refit: bool) -> None:
        self.trained: dict[str, Trained] = {}
        self.refit, self.multiplier = refit, 0.0
        self.max_entropy: float | None = None

    def keep_entropy(self) -> None:
        """From now on the codes have no more entropy than they have."""
        self.max_entropy = mean_entropy([trained.counts() for trained in self.trained.values()])

    def step(self, *_: Any) -> None:
        """Follow a step of the optimizer."""
        for trained in self.trained.values():
            trained.move()
        if self.max_entropy is not None:
            self._constrain(self.max_entropy)
        for trained in self.trained.values():
            trained.quantize(self.refit)

    def _constrain(self, max_entropy: float) -> None:
        """Set the boundaries of all codes, by about the least multiplier under which they keep to their entropy."""
        now = [(trained, trained.counts()) for trained in self.trained.values()]
        self.multiplier *= DECAY
        if self.multiplier < LEAST:
            self.multiplier = 0.0
        while True:
            found = [trained.constrain(counts, self.multiplier) for trained, counts in now]
            if mean_entropy(found) <= max_entropy * (1 + 1e-9):
                return
            self.multiplier = max(LEAST, GROWTH * self.multiplier)
