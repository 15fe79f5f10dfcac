"""What an observation is, and what is asked of who observes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

# v by parameter name -> F v.
FisherProduct = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
# (outputs, samples, count) -> targets and what to scale gradients by, as of `LabelSampler.draw`.
DrawLabels = Callable[[Any, int, int], tuple[Any, float | Tensor]]


@dataclass(frozen=True)
class Observation:
    """One chunk of what a curvature model observes; parameters go by name.

    Attributes:
        count: gradients or samples in this chunk.
        gradients: name -> [count, *shape], zero where a mask is False.
        inputs: name -> [rows, fan_in], what the layer's weight is multiplied by: a row for each sample and position.
            A convolution with g groups has [g, rows, fan_in]. The layers come one at a time.
        output_gradients: name -> [rows, fan_out], of each sample's loss by the layer's outputs, a row for each sample
            and position. The layers come one at a time.
        fisher_product: multiplies by the whole network's Fisher matrix, the mean over the samples of this chunk without
            sampled labels: the generalised Gauss-Newton matrix.
    """

    count: int
    gradients: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    output_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    fisher_product: FisherProduct | None = None


class Observer(Protocol):
    """What `observe` asks of a curvature model."""

    @property
    def observes(self) -> frozenset[str]:
        """Either "gradients", perhaps with "fisher_products", or any of "inputs" and "output_gradients"."""

    def update(self, observation: Observation) -> None:
        """Take in one chunk."""
