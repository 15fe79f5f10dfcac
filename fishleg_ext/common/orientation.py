"""Turns parameters into matrices [out, fan-in]. No other place knows which dimensions of a parameter are outputs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Orientation:
    """The dimensions of a parameter in the order outputs first, then fan-in.

    Attributes:
        shape: of the parameter.
        split: the same entries with some dimensions split up.
        order: of these dimensions.
        num_out: how many of them, in that order, are outputs.

    Examples:
        >>> Orientation.of((4, 3), (1, 0)).to_matrix(torch.arange(12).reshape(4, 3)).shape
        torch.Size([3, 4])
    """

    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    num_out: int = 1

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        order: Sequence[int] | None = None,
        *,
        split: Sequence[int] | None = None,
        num_out: int = 1,
    ) -> "Orientation":
        """Make an orientation; by default the first dimension is the outputs, and the others are the fan-in.

        A parameter of one dimension is a single row.
        """
        split = tuple(shape if split is None else split)
        order = tuple(range(len(split)) if order is None else order)
        return cls(tuple(shape), split, order, num_out if len(split) > 1 else 0)

    @property
    def is_plain(self) -> bool:
        """Tell whether the matrix is the parameter as it is, or flattened from its second dimension on."""
        return self.split == self.shape and self.order == tuple(range(len(self.order))) and self.num_out <= 1

    @property
    def fan_in(self) -> int:
        """Weights of one output."""
        return math.prod(self.split[dim] for dim in self.order[self.num_out :])

    @property
    def matrix_shape(self) -> tuple[int, ...]:
        """Shape of `to_matrix`: outputs, then the dimensions of the fan-in."""
        if self.is_plain:
            return self.shape
        outs = math.prod(self.split[dim] for dim in self.order[: self.num_out])
        return (outs, *(self.split[dim] for dim in self.order[self.num_out :]))

    def to_matrix(self, x: Tensor) -> Tensor:
        """[..., *shape] -> [..., *matrix_shape]."""
        if self.is_plain:
            return x
        lead = x.dim() - len(self.shape)
        x = x.reshape(*x.shape[:lead], *self.split)
        x = x.permute(*range(lead), *(lead + dim for dim in self.order))
        return x.reshape(*x.shape[:lead], *self.matrix_shape)

    def to_parameter(self, x: Tensor) -> Tensor:
        """[..., *matrix_shape] -> [..., *shape], the inverse of `to_matrix`."""
        if self.is_plain:
            return x
        lead = x.dim() - len(self.matrix_shape)
        x = x.reshape(*x.shape[:lead], *(self.split[dim] for dim in self.order))
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return x.permute(*range(lead), *(lead + dim for dim in back)).reshape(*x.shape[:lead], *self.shape)

    def positions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Row and column in the matrix of entries of the parameter, given by their index in row-major order."""
        steps = [math.prod(self.split[dim + 1 :]) for dim in range(len(self.split))]
        place = lambda dim: index // steps[dim] % self.split[dim]
        row = col = torch.zeros_like(index)
        for dim in self.order[: self.num_out]:
            row = row * self.split[dim] + place(dim)
        for dim in self.order[self.num_out :]:
            col = col * self.split[dim] + place(dim)
        return row, col
