"""The diagonal of the empirical Fisher matrix."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext.common.arguments import checked_positive
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.settings import setting
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import Blocks, Curvature, Estimate, curvature_entry, load_tensors
from fishleg_ext.observation.types import Observation


@dataclass(frozen=True)
class DiagonalFisher(Curvature):
    """F_i = damping + mean_s g_si^2. Costs are those of Tu et al. 2016, arXiv 1605.04859; nothing is compensated.

    Args:
        damping: added to each entry, > 0, in the units of a squared gradient.
    """

    damping: float = setting(1e-5, checked_positive)

    name: ClassVar[str] = "diagonal"
    default_saliency: ClassVar[str] = "simultaneous"

    @override
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        return BlockLayout(weight.shape, 1)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "DiagonalEstimate":
        return DiagonalEstimate(self, weights, biases, **options)

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count one number a weight."""
        return weight.numel() * widened(weight.dtype).itemsize


class DiagonalEstimate(Estimate[DiagonalFisher]):
    """Sums of squared gradients."""

    def __init__(self, recipe: DiagonalFisher, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._squares = {
            name: torch.zeros(w.shape, dtype=widened(w.dtype), device=w.device) for name, w in weights.items()
        }
        self._count = 0

    @override
    def update(self, observation: Observation) -> None:
        for name in observation.gradients:
            squares = self._squares[name]
            squares += observation.sum_of_squares(name, squares)
        self._count += observation.count

    @override
    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x * self._inverse(name) for name, x in v.items()}

    @override
    def diag(self) -> dict[str, Tensor]:
        return {name: self._inverse(name) for name in self._squares}

    @override
    def blocks(self, name: str) -> Blocks:
        return Blocks(self._inverse(name).reshape(-1, 1, 1))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        return 0.5 * sum(read((dw.double().square() / self._inverse(name)).sum() for name, dw in step.items()))

    def state_dict(self) -> dict[str, Any]:
        """Return sums of squares and how many gradients went into them."""
        return {"count": self._count, "squares": dict(self._squares)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_tensors(self._squares, curvature_entry(state, "squares"))
        self._count = int(curvature_entry(state, "count"))

    @override
    def _merge(self, other: "DiagonalEstimate") -> None:
        for name, squares in self._squares.items():
            squares += other._squares[name].to(squares.device)
        self._count += other._count

    def _inverse(self, name: str) -> Tensor:
        return 1 / (self._squares[name] / max(1, self._count) + self.recipe.damping)
