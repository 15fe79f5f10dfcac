"""The block-diagonal empirical Fisher matrix."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.arguments import checked_count, checked_damping
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError, load_tensors, state_entry
from fishleg_ext.observation.types import Observation


class BlockFisher(Curvature):
    """F_b = damping I + mean_s g_s g_s^T for each block b of consecutive weights.

    Singh and Alistarh, WoodFisher, NeurIPS 2020; Kurtic et al., oBERT, arXiv 2203.07259; Kuznedelev et al., CAP,
    arXiv 2210.09223. Gradients are summed up in Gram matrices as they come, block_size * 4 bytes a weight; inverses
    are computed when asked for and not kept.

    Args:
        block_size: weights in a block, B.
        damping: added to the diagonal, >= 0, in the units of a squared gradient. A block that is not positive
            definite is damped more, with a warning, and counted in `damping_raised`.
    """

    def __init__(self, block_size: int = 128, damping: float = 1e-5) -> None:
        super().__init__()
        self.block_size = checked_count("block_size", block_size)
        self.damping = checked_damping(damping, positive=False)

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Blocks of block_size."""
        return BlockLayout(weight.shape, self.block_size)

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Zero Gram matrices."""
        super().start(weights)
        self._gram = {
            name: torch.zeros(
                layout.num_blocks,
                layout.block_size,
                layout.block_size,
                dtype=widened(weights[name].dtype),
                device=weights[name].device,
            )
            for name, layout in self.layouts.items()
        }
        for name, gram in self._gram.items():  # padding must not make a block singular
            gram.diagonal(dim1=1, dim2=2).masked_fill_(~self.layouts[name].is_weight(gram.device), 1)
        self._count = 0

    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """A Gram matrix a block."""
        layout = self.layout(name, weight)
        return layout.num_blocks * layout.block_size**2 * widened(weight.dtype).itemsize

    def update(self, observation: Observation) -> None:
        """Add the gradients' outer products."""
        for name, grads in observation.gradients.items():
            ops.block_gram_(self._gram[name], self.layouts[name].to_blocks(grads))
        self._count += observation.count

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One inversion a layer, one product a block."""
        bar = progress_bar(v.items(), what="products", show=self.progress)
        return {name: self._apply(name, self._inverse(name), x) for name, x in bar}

    def diag(self) -> dict[str, Tensor]:
        """One inversion a layer."""
        return {
            name: layout.from_blocks(self._inverse(name).diagonal(dim1=1, dim2=2))
            for name, layout in progress_bar(self.layouts.items(), what="diagonal", show=self.progress)
        }

    def blocks(self, name: str) -> Blocks:
        """The inverse of each block of F is that block of F^-1."""
        return Blocks(self._inverse(name))

    def joint_cost(self, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> float:
        """1/2 dw^T F dw of the best step that zeroes P, block by block."""
        total = 0.0
        for name, weight in progress_bar(weights.items(), what="joint cost", show=self.progress):
            layout, gram = self.layouts[name], self._gram[name]
            blocks = layout.to_blocks(weight).to(gram.dtype)
            step = blocks - ops.obs_compensate(blocks, self._inverse(name), layout.to_blocks(pruned[name]))
            fisher_step = self._apply(name, gram, layout.from_blocks(step)) / max(1, self._count)
            fisher_step += self.damping * layout.from_blocks(step)
            total += 0.5 * float((layout.from_blocks(step) * fisher_step).sum(dtype=torch.float64))
        return total

    def state_dict(self) -> dict[str, Any]:
        """Gram matrices and how many gradients went into them."""
        return {"count": self._count, "gram": dict(self._gram)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        load_tensors(self._gram, state_entry(state, "gram"))
        self._count = int(state_entry(state, "count"))

    def _apply(self, name: str, matrix: Tensor, x: Tensor) -> Tensor:
        """Blocks of `matrix` [K, B, B] times a tensor of the parameter's shape."""
        layout = self.layouts[name]
        return layout.from_blocks((matrix @ layout.to_blocks(x).to(matrix.dtype)[..., None])[..., 0])

    def _inverse(self, name: str) -> Tensor:
        # (gram / count + damping)^-1 = count * (gram + count * damping)^-1 spares a copy of the Gram matrices.
        count = max(1, self._count)
        inverse, info = ops.block_inverse(self._gram[name], self.damping * count)
        failed = int((info < 0).sum())
        if failed:
            raise CurvatureError(
                f"{name}: {failed} of {len(info)} Fisher blocks cannot be inverted, even with damping raised from "
                f"{self.damping:g} twelve times; use a larger damping, or more gradients"
            )
        raised = int((info > 0).sum())
        if raised and name not in self.damping_raised:
            warnings.warn(
                f"{name}: {raised} of {len(info)} Fisher blocks are not positive definite with damping "
                f"{self.damping:g}; it was raised tenfold up to {int(info.max())} times for these",
                stacklevel=2,
            )
            self.damping_raised[name] = raised
        return inverse.mul_(count)
