"""The identity: pruning by magnitude."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import Blocks, Curvature, Estimate
from fishleg_ext.observation.types import Observation


@dataclass(frozen=True)
class Identity(Curvature):
    """F = I: the cost of a weight is w^2 / 2 and nothing is compensated. Needs no data.

    num_grads and grad_batch_size say how many samples `first_order=` reads; without it nothing is read.
    """

    name: ClassVar[str] = "identity"
    observes: ClassVar[frozenset[str]] = frozenset()
    default_saliency: ClassVar[str] = "simultaneous"

    @override
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        return BlockLayout(weight.shape, 1)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "IdentityEstimate":
        return IdentityEstimate(self, weights, biases, **options)

    @override
    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        return 0


class IdentityEstimate(Estimate[Identity]):
    """The identity of the shape of some weights."""

    def __init__(self, recipe: Identity, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._ones = {
            name: torch.ones((), dtype=widened(w.dtype), device=w.device).expand(w.shape) for name, w in weights.items()
        }

    @override
    def update(self, observation: Observation) -> None:
        pass

    @override
    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(v)

    @override
    def diag(self) -> dict[str, Tensor]:
        return dict(self._ones)

    def blocks(self, name: str) -> Blocks:
        """Return one block of size 1, shared by all weights."""
        return Blocks(self._ones[name].new_ones(1, 1, 1))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        return 0.5 * sum(read(dw.double().square().sum() for dw in step.values()))

    @override
    def _merge(self, other: "IdentityEstimate") -> None:
        pass
