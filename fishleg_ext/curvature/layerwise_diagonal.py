"""The diagonal of the curvature of each layer's own output error: the norms of its inputs."""

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
from fishleg_ext.curvature.base import Blocks
from fishleg_ext.curvature.kronecker import matrix_shape
from fishleg_ext.curvature.layerwise import Layerwise, LayerwiseEstimate

DAMPING = 1e-8


@dataclass(frozen=True)
class LayerwiseDiagonal(Layerwise):
    """F_jj = E[a_j^2] + damping * mean_j E[a_j^2] for each row of a layer's weight matrix, a the layer's inputs.

    Pruning weight j of a row costs 1/2 w_j^2 E[a_j^2]: the square of the score |w_j| |a_j| of Sun et al., Wanda,
    arXiv 2306.11695, by which the weights of each row are compared; hence the scope "row". Nothing is compensated.

    Args:
        damping: added to the diagonal, > 0, as a share of its mean, so that inputs that are always zero have an
            inverse; None is 1e-8.
        inputs: see `Layerwise`.
    """

    damping: float | None = setting(None, checked_positive)

    name: ClassVar[str] = "layerwise_diagonal"
    supports_mask: ClassVar[bool] = True  # no weight counts on another
    default_saliency: ClassVar[str] = "simultaneous"
    default_scope: ClassVar[str] = "row"

    @override
    def with_saliency(self, saliency: str | None) -> "LayerwiseDiagonal":
        return self

    @override
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Cut a block for each weight."""
        return BlockLayout(weight.shape, 1)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "LayerwiseDiagonalEstimate":
        return LayerwiseDiagonalEstimate(self, weights, biases, **options)

    @override
    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count one number for each input; a convolution with groups has as many for each."""
        return matrix_shape(weight)[1] * widened(weight.dtype).itemsize


class LayerwiseDiagonalEstimate(LayerwiseEstimate):
    """Sums of a^2 over samples and positions, [groups, fan-in] for each layer."""

    default_damping: ClassVar[float] = DAMPING

    @override
    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x / self._of_weights(name) for name, x in v.items()}

    @override
    def diag(self) -> dict[str, Tensor]:
        return {name: 1 / self._of_weights(name) for name in self.layouts}

    @override
    def fisher_diag(self) -> dict[str, Tensor]:
        return {name: self._of_weights(name) for name in self.layouts}

    @override
    def blocks(self, name: str) -> Blocks:
        return Blocks((1 / self._of_weights(name)).reshape(-1, 1, 1))

    @override
    def factored_blocks(self, name: str) -> Blocks:
        return Blocks(self._of_weights(name).rsqrt().reshape(-1, 1, 1))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        return 0.5 * sum(read([(self._of_weights(n) * dw.square()).sum(dtype=torch.float64) for n, dw in step.items()]))

    @override
    def _zeros(self, name: str) -> Tensor:
        return self._like[name].new_zeros(1, self._fan_in[name])

    @override
    def _add_(self, groups: Tensor, rows: Tensor) -> None:
        groups += rows.to(groups.dtype).square().sum(1)

    def _of_weights(self, name: str) -> Tensor:
        """Return the diagonal, damping included, in the shape of the parameter."""
        squares = self._observed(name) / self._count[name]  # [groups, fan-in]
        mean = squares.mean(1, keepdim=True)
        diagonal = squares + torch.where(mean > 0, self._damping * mean, 1)
        rows = self._rows[name]
        return diagonal.repeat_interleave(rows // len(diagonal), dim=0).reshape(self.layouts[name].shape)
