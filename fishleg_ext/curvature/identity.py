"""The identity: pruning by magnitude."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature.base import Blocks, Curvature
from fishleg_ext.observation.types import Observation


class Identity(Curvature):
    """F = I: the cost of a weight is w^2 / 2 and nothing is compensated for. Needs no data."""

    observes: ClassVar[frozenset[str]] = frozenset()
    default_saliency = "simultaneous"

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Each weight is a block."""
        return BlockLayout(weight.shape, 1)

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Remember shapes alone."""
        super().start(weights)
        self._ones = {
            name: torch.ones((), dtype=widened(w.dtype), device=w.device).expand(w.shape) for name, w in weights.items()
        }

    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """None."""
        return 0

    def update(self, observation: Observation) -> None:
        """Nothing is observed."""

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """V itself."""
        return dict(v)

    def diag(self) -> dict[str, Tensor]:
        """Ones."""
        return dict(self._ones)

    def blocks(self, name: str) -> Blocks:
        """One block of size 1, shared by all weights."""
        return Blocks(self._ones[name].new_ones(1, 1, 1))

    def joint_cost(self, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> float:
        """1/2 |w_P|^2."""
        return sum(float(w[pruned[name]].double().square().sum()) / 2 for name, w in weights.items())
