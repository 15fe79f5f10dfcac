"""The block-diagonal empirical Fisher matrix."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext import ops
from fishleg_ext.common.arguments import checked_count, checked_damping
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.common.settings import setting
from fishleg_ext.curvature.base import Blocks, Curvature, Estimate, curvature_entry, load_tensors
from fishleg_ext.observation.types import Observation


@dataclass(frozen=True)
class BlockFisher(Curvature):
    """F_b = damping I + mean_s g_s g_s^T for each block b of consecutive weights.

    Singh and Alistarh, WoodFisher, NeurIPS 2020; Kurtic et al., oBERT, arXiv 2203.07259; Kuznedelev et al., CAP,
    arXiv 2210.09223.

    Args:
        block_size: weights in a block, B.
        damping: added to the diagonal, >= 0, in the units of a squared gradient. A block that is not positive
            definite is damped more, with a warning, and counted in `damping_raised`.
    """

    block_size: int = setting(128, checked_count)
    damping: float = setting(1e-5, checked_damping)

    name: ClassVar[str] = "block"

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Cut blocks of block_size."""
        return BlockLayout(weight.shape, self.block_size)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "BlockEstimate":
        return BlockEstimate(self, weights, biases, **options)

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count a Gram matrix for each block."""
        layout = self.layout(name, weight)
        return layout.num_blocks * layout.block_size**2 * widened(weight.dtype).itemsize


class BlockEstimate(Estimate[BlockFisher]):
    """Gram matrices, to which gradients are added as they come: block_size * 4 bytes a weight.

    Inverses are computed when asked for and not kept.
    """

    def __init__(self, recipe: BlockFisher, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._gram: dict[str, Tensor] = {}
        for name, layout in self.layouts.items():
            like, size = weights[name], layout.block_size
            gram = torch.zeros(layout.num_blocks, size, size, dtype=widened(like.dtype), device=like.device)
            # Padding must not make a block singular.
            gram.diagonal(dim1=1, dim2=2).masked_fill_(~layout.is_weight(gram.device), 1)
            self._gram[name] = gram
        self._count = 0

    @override
    def update(self, observation: Observation) -> None:
        self._kept.clear()
        for name in observation.gradients:
            layout, gram = self.layouts[name], self._gram[name]
            row = layout.numel // max(1, layout.shape[0]) if layout.shape else 1
            rows = layout.block_size // math.gcd(layout.block_size, max(1, row))  # after which a block begins
            for first, grads in observation.row_parts(name, rows):
                here, blocks = layout.part_to_blocks(first * row, grads.flatten(1))
                ops.block_gram_(gram[here], blocks)
        self._count += observation.count

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return F^-1 v, by one inversion a layer and one product a block."""
        bar = progress_bar(v.items(), what="products", show=self.progress)
        return {name: self._apply(name, self._inverse(name), x) for name, x in bar}

    def diag(self) -> dict[str, Tensor]:
        """Return the diagonal of F^-1, by one inversion a layer."""
        return {
            name: layout.from_blocks(self._inverse(name).diagonal(dim1=1, dim2=2))
            for name, layout in progress_bar(self.layouts.items(), what="diagonal", show=self.progress)
        }

    @override
    def blocks(self, name: str) -> Blocks:
        return Blocks(self._inverse(name))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        total = 0.0
        for name, dw in step.items():
            gram = self._gram[name]
            rows = self.layouts[name].to_blocks(dw).to(gram.dtype)
            force = (gram @ rows[..., None])[..., 0] / max(1, self._count) + self.recipe.damping * rows
            total += 0.5 * float((rows * force).sum(dtype=torch.float64))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Return Gram matrices and how many gradients went into them."""
        return {"count": self._count, "gram": dict(self._gram)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._kept.clear()
        load_tensors(self._gram, curvature_entry(state, "gram"))
        self._count = int(curvature_entry(state, "count"))

    @override
    def _merge(self, other: "BlockEstimate") -> None:
        self._kept.clear()
        for name, gram in self._gram.items():
            gram += other._gram[name].to(gram.device)
            # The ones in the padding are there twice.
            gram.diagonal(dim1=1, dim2=2).masked_fill_(~self.layouts[name].is_weight(gram.device), 1)
        self._count += other._count

    def _apply(self, name: str, matrix: Tensor, x: Tensor) -> Tensor:
        """Multiply a tensor of the parameter's shape by blocks `matrix` [K, B, B]."""
        layout = self.layouts[name]
        return layout.from_blocks((matrix @ layout.to_blocks(x).to(matrix.dtype)[..., None])[..., 0])

    def _inverse(self, name: str) -> Tensor:
        # (gram / count + damping)^-1 = count * (gram + count * damping)^-1 spares a copy of the Gram matrices.
        count = max(1, self._count)

        def invert() -> tuple[Tensor]:
            inverse, info = ops.block_inverse(self._gram[name], self.recipe.damping * count)
            self._check_inverted(name, info, self.recipe.damping, "Fisher blocks")
            return (inverse.mul_(count),)

        return self._keeping(name, invert)[0]
