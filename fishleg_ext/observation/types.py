"""What an observation is, and what is asked of who observes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

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
        gradient_factors: name -> the same in factors, G = D^T X, of the weights that have them and no mask.
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


class Observer(Protocol):
    """What `observe` asks of a curvature model."""

    @property
    def observes(self) -> frozenset[str]:
        """Either "gradients", perhaps with "fisher_products", or any of "inputs" and "output_gradients"."""

    def update(self, observation: Observation) -> None:
        """Take in one chunk."""
