"""Defines what an observation is, and what is asked of who observes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from fishleg_ext.observation.gradient_factors import GradientFactors

# v by parameter name -> F v.
FisherProduct = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# (outputs, targets, samples, count) -> targets and what to scale gradients by, as of `LabelSampler.draw`.
DrawLabels = Callable[[Any, Any, int, int], tuple[Any, float | Tensor]]


class ProductRows(NamedTuple):
    """Inputs of one product y = W x of a weight matrix W, or gradients by its outputs.

    Attributes:
        rows: [groups, n, fan_in], or [groups, n, fan_out / groups]: a row for each sample and position.
        outputs: first row of W that takes part, and the one after the last, in `groups` equal groups; each has inputs
            of its own, as in a convolution with groups.
    """

    rows: Tensor
    outputs: tuple[int, int]


@dataclass(frozen=True)
class Observation:
    """One chunk of what a curvature model observes; parameters go by name.

    Attributes:
        count: gradients in this chunk; or samples whose inputs and output gradients have come before this, in
            observations of their own, which count as 0.
        gradients: name -> [count, *shape], the outputs of the parameter first, zero where a mask is False. Computed
            when they are asked for, and not kept: ask for each once.
        gradient_factors: name -> the same in factors, G = D^T X, of the weights that have them.
        inputs: name -> what the weight is multiplied by in one product.
        output_gradients: name -> gradients of each sample's loss by the outputs of one product.
        fisher_product: multiplies by the whole network's Fisher matrix, the mean over the samples of this chunk without
            sampled labels: the generalised Gauss-Newton matrix.
    """

    count: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    gradient_factors: Mapping[str, GradientFactors] = field(default_factory=dict)
    inputs: Mapping[str, ProductRows] = field(default_factory=dict)
    output_gradients: Mapping[str, ProductRows] = field(default_factory=dict)
    fisher_product: FisherProduct | None = None

    def rows_at_a_time(self, name: str, multiple: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield the gradients of one parameter, some rows of its matrix at a time, where that is faster.

        Args:
            name: of the parameter.
            multiple: parts begin at a multiple of as many rows.

        Yields:
            the first row, and gradients of rows from there on, [count, rows, ...]; all rows where they are not in
            factors.
        """
        if (factors := self._multiplied_out_here(name)) is not None:
            yield from factors.rows_at_a_time(multiple)
        else:
            yield 0, self.gradients[name]

    def sum_of_squares(self, name: str, like: Tensor) -> Tensor:
        """Return the sum of the squares of all gradients of one parameter, in the shape and dtype of `like`."""
        if (factors := self._multiplied_out_here(name)) is not None:
            return factors.sum_of_squares(like.dtype).reshape(like.shape)
        return self.gradients[name].to(like.dtype).square().sum(0)

    def _multiplied_out_here(self, name: str) -> GradientFactors | None:
        """Factors of a parameter; those of half precision, which may overflow, are multiplied out and looked at."""
        factors = self.gradient_factors.get(name)
        return None if factors is None or factors.like.dtype == torch.float16 else factors


class Observer(Protocol):
    """Says what `observe` asks of a curvature model."""

    @property
    def observes(self) -> frozenset[str]:
        """Either "gradients", perhaps with "fisher_products", or any of "inputs" and "output_gradients"."""

    def update(self, observation: Observation) -> None:
        """Take in one chunk."""
