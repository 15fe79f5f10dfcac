"""The diagonal of the empirical Fisher matrix."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.arguments import checked_damping
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature.base import Blocks, Curvature, load_tensors, state_entry
from fishleg_ext.observation.types import Observation


class DiagonalFisher(Curvature):
    """F_i = damping + mean_s g_si^2. Costs are those of Tu et al. 2016, arXiv 1605.04859; nothing is compensated for.

    Args:
        damping: added to each entry, > 0, in the units of a squared gradient.
    """

    default_saliency = "simultaneous"

    def __init__(self, damping: float = 1e-5) -> None:
        super().__init__()
        self.damping = checked_damping(damping, positive=True)

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Each weight is a block."""
        return BlockLayout(weight.shape, 1)

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Zero sums."""
        super().start(weights)
        self._squares = {
            name: torch.zeros(w.shape, dtype=widened(w.dtype), device=w.device) for name, w in weights.items()
        }
        self._count = 0

    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """One number a weight."""
        return weight.numel() * widened(weight.dtype).itemsize

    def update(self, observation: Observation) -> None:
        """Add squared gradients."""
        for name, grads in observation.gradients.items():
            squares = self._squares[name]
            squares += grads.to(squares.dtype).square().sum(0)
        self._count += observation.count

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Entry by entry."""
        return {name: x * self._inverse(name) for name, x in v.items()}

    def diag(self) -> dict[str, Tensor]:
        """1 / F."""
        return {name: self._inverse(name) for name in self._squares}

    def blocks(self, name: str) -> Blocks:
        """Blocks of size 1."""
        return Blocks(self._inverse(name).reshape(-1, 1, 1))

    def joint_cost(self, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> float:
        """1/2 sum_P F w^2."""
        return sum(
            float((w.double().square() / self._inverse(name))[pruned[name]].sum()) / 2 for name, w in weights.items()
        )

    def state_dict(self) -> dict[str, Any]:
        """Sums of squares and how many gradients went into them."""
        return {"count": self._count, "squares": dict(self._squares)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        load_tensors(self._squares, state_entry(state, "squares"))
        self._count = int(state_entry(state, "count"))

    def _inverse(self, name: str) -> Tensor:
        return 1 / (self._squares[name] / max(1, self._count) + self.damping)
