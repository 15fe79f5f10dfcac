"""The parameters of an optimizer: weight matrices with their biases, and others."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.common.waiting import read_by_name
from fishleg_ext.curvature.base import CurvatureError, curvature_entry
from fishleg_ext.curvature.fishleg import LARGEST_FACTOR
from fishleg_ext.curvature.kronecker import Factors
from fishleg_ext.curvature.learned_factors import Gradients, gradients_of, kept_in_factors
from fishleg_ext.observation.gradient_factors import GradientFactors
from fishleg_ext.observation.types import Observation
from fishleg_ext.optim.running import DescendedFactors, RunningFactors, check_shapes
from fishleg_ext.sparsity.parameters import biases_of, layer_weights, orientations_of


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight matrix [o, i], with the bias of its products as one more column where it has one.

    Attributes:
        name: of the weight.
        bias: name of the bias, or None.
        parameters: name -> parameter of both.
        orientation: how the weight is seen as a matrix.
        running: its factors.
    """

    name: str
    bias: str | None
    parameters: Mapping[str, nn.Parameter]
    orientation: Orientation
    running: RunningFactors | DescendedFactors

    def matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Put a tensor of the weight's shape and one of the bias's, or zeros for either, together: [o, i]."""
        weight = tensors.get(self.name)
        weight = self.orientation.to_matrix(torch.zeros_like(self.parameters[self.name]) if weight is None else weight)
        matrix = weight.reshape(len(self.running.row), -1).to(self.running.row.dtype)
        if self.bias is not None:
            bias = tensors.get(self.bias)
            column = matrix.new_zeros(len(matrix)) if bias is None else bias.to(matrix.dtype)
            matrix = torch.cat([matrix, column.reshape(-1, 1)], dim=1)
        return matrix

    def parts(self, matrix: Tensor) -> dict[str, Tensor]:
        """Take a matrix apart, the inverse of `matrix`."""
        fan_in = self.orientation.fan_in
        weight = matrix[:, :fan_in].reshape(self.orientation.matrix_shape)
        found = {self.name: self.orientation.to_parameter(weight)}
        if self.bias is not None:
            found[self.bias] = matrix[:, fan_in].reshape(self.parameters[self.bias].shape)
        return found

    def gradients(self, observation: Observation) -> Gradients:
        """Return the gradients of an observation as matrices."""
        return gradients_of(observation, self.name, self.bias, self.running.row.dtype, form=self.running.form)

    def bytes_of(self, factors: GradientFactors) -> int:
        """Count the memory of one gradient as `gradients` returns it, with products of its factors among themselves."""
        rows, cols, t = len(self.running.row), len(self.running.col), factors.rows
        kept = kept_in_factors(factors, self.bias, self.running.form)
        return (t * (rows + cols + 2 * t) if kept else rows * cols) * self.running.row.element_size()

    def observe(self, observations: Sequence[Observation], memory: float) -> None:
        """Update the factors."""
        self.running.observe([self.gradients(observation) for observation in observations], memory)

    def factors(self, weight: Tensor, damping: float, bias: str | None) -> Factors:
        """Return the inverse of each row of the weight by itself.

        Args:
            weight: as a matrix [o, ...], whose fan-in may lie in another order than here.
            damping: of F.
            bias: name of the bias that is the last column, if any is.

        Raises:
            ValueError: the weight is not this one, or there is no bias.
            CurvatureError: there is no inverse.
        """
        fan_in, own = self.orientation.fan_in, self.orientation.to_matrix(self.parameters[self.name])
        columns = torch.arange(fan_in, device=weight.device)
        if not _equal(own, weight):  # n:m patterns have channels last
            columns = columns.reshape(own.shape[1:]).movedim(0, -1).flatten()
            if not _equal(own.movedim(1, -1), weight):
                raise ValueError(f"{self.name} is not the weight that the optimizer has; was the model copied?")
        if bias is not None and self.bias != bias:
            raise ValueError(f"the optimizer does not have {bias}, which would be compensated with {self.name}")
        if bias is not None:
            columns = torch.cat([columns, columns.new_tensor([fan_in])])
        factors, failed = self.running.diagonal_rows(columns, damping)
        check_inverted({self.name: failed})
        return factors


class Diagonal:
    """A parameter whose F is diagonal: the running mean of squared gradients of groups of samples."""

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter, self.batches = name, parameter, 0
        self.squares = torch.zeros_like(parameter, dtype=widened(parameter.dtype))

    def observe(self, gradients: Tensor, memory: float) -> None:
        """Take in gradients [count, *shape] of drawn labels, whose mean square is the diagonal of F."""
        self.batches += 1
        squares = gradients.to(self.squares.dtype).square().mean(0)
        self.squares = self.squares.lerp(squares, max(1 / self.batches, 1 - memory))

    def solve(self, gradient: Tensor, damping: float) -> Tensor:
        """Return (F + damping I)^-1 g."""
        return gradient / (self.squares + damping)

    def factors(self, weight: Tensor, damping: float, bias: "Diagonal | None") -> Factors:
        """Return 1 / (F + damping) as the square of a scale, with a bias as one more column."""
        squares = self.squares.reshape(len(weight) if weight.dim() > 1 else 1, -1)
        if bias is not None:
            squares = torch.cat([squares, bias.squares.reshape(-1, 1)], dim=1)
        scale = (squares + damping).rsqrt()
        return Factors(scale.new_ones(len(scale)), torch.eye(scale.shape[1]).to(scale), scale)

    def check_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a state is of another shape."""
        check_shapes(name, {"squares": self.squares}, state)

    def state_dict(self) -> dict[str, Any]:
        """Return the mean and how many updates went into it."""
        return {"batches": self.batches, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.squares = curvature_entry(state, "squares").to(self.squares).clone()
        self.batches = int(curvature_entry(state, "batches"))


def check_inverted(failed: Mapping[str, Tensor]) -> None:
    """Raise CurvatureError where factors have no inverse, by the name of the weight -> not 0."""
    if bad := [name for name, value in read_by_name(failed).items() if value != 0]:
        raise CurvatureError(f"the factors of {', '.join(bad)} have no inverse; use more damping or a smaller lr")


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


Make = Callable[[int, int, Tensor], RunningFactors | DescendedFactors]


def layers_of(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], make: Make
) -> tuple[list[Layer], list[Diagonal]]:
    """Find the weight matrices among some parameters of a model, and the others.

    Args:
        model: any module.
        parameters: name -> parameter.
        make: (rows, cols, like) -> factors. A matrix with more than `LARGEST_FACTOR` of either is among the others.
    """
    matrices = {id(weight) for module in model.modules() for _, weight in layer_weights(module)}
    weights = {name: p for name, p in parameters.items() if id(p) in matrices and p.dim() > 1 and p.numel()}
    orientations = orientations_of(model, weights)
    for name, orientation in orientations.items():
        rows = math.prod(orientation.matrix_shape) // orientation.fan_in
        if max(rows, orientation.fan_in) > LARGEST_FACTOR:
            del weights[name]
    biases = {name: bias for name, bias in biases_of(model, weights).items() if bias in parameters}
    layers = []
    for name, weight in weights.items():
        bias, orientation = biases.get(name), orientations[name]
        held = {name: weight} if bias is None else {name: weight, bias: parameters[bias]}
        like = weight.new_empty(0, dtype=widened(weight.dtype))
        rows, cols = weight.numel() // orientation.fan_in, orientation.fan_in + (bias is not None)
        layers.append(Layer(name, bias, held, orientation, make(rows, cols, like)))
    known = {name for layer in layers for name in layer.parameters}
    return layers, [Diagonal(name, p) for name, p in parameters.items() if name not in known and p.numel()]
