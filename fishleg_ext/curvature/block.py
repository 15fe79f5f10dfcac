"""The block-diagonal empirical Fisher matrix."""

import math
from collections.abc import Iterator, Mapping
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
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import CACHE_BYTES, Blocks, Curvature, Estimate, curvature_entry, load_tensors
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

    Inverses are computed when asked for.
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
            for first, grads in observation.rows_at_a_time(name, rows):
                here, blocks = layout.entries_to_blocks(
                    first * row, grads.reshape(len(grads), math.prod(grads.shape[1:]))
                )
                ops.block_gram_(gram[here], blocks)
        self._count += observation.count

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return F^-1 v, by one inversion a layer and one product a block."""
        result = {}
        for name, x in progress_bar(v.items(), what="products", show=self.progress):
            layout = self.layouts[name]
            rows = layout.to_blocks(x).to(self._gram[name].dtype)[..., None]
            products = [(inverse @ rows[part])[..., 0] for part, inverse in self._inverses_at_a_time(name)]
            result[name] = layout.from_blocks(torch.cat(products))
        return result

    def diag(self) -> dict[str, Tensor]:
        """Return the diagonal of F^-1, by one inversion a layer."""
        result = {}
        for name, layout in progress_bar(self.layouts.items(), what="diagonal", show=self.progress):
            parts = self._inverses_at_a_time(name)
            diagonals = [inverse.diagonal(dim1=1, dim2=2).clone() for _, inverse in parts]
            result[name] = layout.from_blocks(torch.cat(diagonals))
        return result

    @override
    def fisher_diag(self) -> dict[str, Tensor]:
        means = ((name, gram.diagonal(dim1=1, dim2=2) / max(1, self._count)) for name, gram in self._gram.items())
        return {name: self.layouts[name].from_blocks(mean + self.recipe.damping) for name, mean in means}

    @override
    def blocks(self, name: str) -> Blocks:
        return Blocks(self._inverse(name))

    @override
    def blocks_at_a_time(self, name: str) -> Iterator[tuple[slice, Blocks]]:
        if self._at_once(name) >= self.layouts[name].num_blocks:
            return super().blocks_at_a_time(name)
        return ((part, Blocks(inverse)) for part, inverse in self._inverses_at_a_time(name))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        terms = []
        for name, dw in step.items():
            gram = self._gram[name]
            rows = self.layouts[name].to_blocks(dw).to(gram.dtype)
            force = (gram @ rows[..., None])[..., 0] / max(1, self._count) + self.recipe.damping * rows
            terms.append((rows * force).sum(dtype=torch.float64))
        return 0.5 * sum(read(terms))

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

    def _inverse(self, name: str) -> Tensor:
        def invert() -> tuple[Tensor]:
            inverse, info = self._inverted(self._gram[name])
            self._check_inverted(name, info, self.recipe.damping, "Fisher blocks")
            return (inverse,)

        return self._keeping(name, invert)[0]

    def _at_once(self, name: str) -> int:
        """Count the blocks of a parameter that are inverted at a time."""
        gram = self._gram[name]
        bytes_each = max(1, gram[:1].numel() * gram.element_size())
        return max(1, CACHE_BYTES // bytes_each) if gram.device.type == "cpu" else len(gram)

    def _inverses_at_a_time(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield the inverses, those of a large parameter on a CPU a few at a time, and not kept."""
        gram, step = self._gram[name], self._at_once(name)
        if step >= len(gram):
            yield slice(None), self._inverse(name)
            return
        infos = []
        for start in range(0, len(gram), step):
            part = slice(start, start + step)
            inverse, info = self._inverted(gram[part])
            infos.append(info)
            yield part, inverse
            del inverse  # before the next are computed
        self._check_inverted(name, torch.cat(infos), self.recipe.damping, "Fisher blocks")

    def _inverted(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        # (gram / count + damping)^-1 = count * (gram + count * damping)^-1 spares a copy of the Gram matrices.
        count = max(1, self._count)
        inverse, info = ops.block_inverse(gram, self.recipe.damping * count)
        return inverse.mul_(count), info
