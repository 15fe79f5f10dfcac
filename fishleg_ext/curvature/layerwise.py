"""The curvature of each layer's own output error, from its inputs."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext import ops
from fishleg_ext.common.arguments import checked_positive, one_of
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.common.settings import setting
from fishleg_ext.common.triangular import inverse_factor
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError, Estimate, check_names, curvature_entry
from fishleg_ext.curvature.kronecker import matrix_shape
from fishleg_ext.observation.types import Observation

DAMPING, FIXED_ORDER_DAMPING = 1e-4, 1e-2


@dataclass(frozen=True)
class Layerwise(Curvature):
    """F = A + damping * mean(diag A) * I for each row of a layer's weight matrix, A = E[a a^T] over the layer's inputs.

    A row w of a Linear or Conv layer gives the outputs w . a, a the inputs it is multiplied by (for a convolution the
    patch at each position), so that moving it by dw costs 1/2 E (dw . a)^2 = 1/2 dw^T A dw of squared output error, a
    mean over the network's samples and a sum over positions, and over all products of a shared weight. All rows share
    A; where groups of rows have inputs of their own, as in a convolution with groups or the experts of a fused weight,
    each has its own A. Frantar and Alistarh, OBC, arXiv 2208.11580, eq. 2; SparseGPT, arXiv 2301.00774.

    Needs forward passes alone. Costs are in the units of each layer's own outputs, hence the scope "layer".

    Args:
        damping: added to the diagonal, > 0, as a share of the mean of the diagonal of A; None is 1e-4, and 1e-2 for
            `saliency="fixed_order"`, which was more accurate so on held-out data. With much less than 1e-4 an inverse
            in float32 has no right digits where there are fewer samples than inputs.
        inputs: "dense": those of the network as it is at the estimate; "sequential": those that the layers pruned so
            far give. By itself that is one layer after the other, in the order of the model's parameters, with one pass
            over the data for each; `block_by_block` prunes all layers of a block together and passes once. None is
            "sequential" with `block_by_block`, else "dense".
    """

    damping: float | None = setting(None, checked_positive)
    inputs: str | None = setting(None, one_of("dense", "sequential"))

    name: ClassVar[str] = "layerwise"
    observes: ClassVar[frozenset[str]] = frozenset({"inputs"})
    conditions_on_masks: ClassVar[bool] = False
    default_scope: ClassVar[str] = "layer"

    @property
    @override
    def sequential(self) -> bool:
        return self.inputs == "sequential"

    @property
    @override
    def dense_inputs(self) -> bool:
        return self.inputs == "dense"

    @override
    def with_saliency(self, saliency: str | None) -> "Layerwise":
        if self.damping is None and saliency == "fixed_order":
            return replace(self, damping=FIXED_ORDER_DAMPING)
        return self

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Cut a block for each row, of fan-in size."""
        return BlockLayout(weight.shape, matrix_shape(weight)[1])

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "LayerwiseEstimate":
        return LayerwiseEstimate(self, weights, biases, **options)

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count a matrix of fan-in x fan-in; a convolution with groups has one for each."""
        return matrix_shape(weight)[1] ** 2 * widened(weight.dtype).itemsize


class LayerwiseEstimate(Estimate[Layerwise]):
    """Sums of a a^T over samples and positions, [groups, fan-in, fan-in] for each layer."""

    default_damping: ClassVar[float] = DAMPING

    def __init__(self, recipe: Layerwise, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._damping = self.default_damping if recipe.damping is None else recipe.damping
        self._rows, self._fan_in = ({n: matrix_shape(w)[i] for n, w in weights.items()} for i in (0, 1))
        self._like = {name: weight.new_empty(0, dtype=widened(weight.dtype)) for name, weight in weights.items()}
        self._gram: dict[str, Tensor] = {}
        self._count = dict.fromkeys(weights, 0)  # samples

    @override
    def update(self, observation: Observation) -> None:
        self._kept.clear()
        for name, (rows, (first, last)) in observation.inputs.items():
            outputs, gram = self._rows[name], self._gram.get(name)
            if gram is None:
                gram = self._zeros(name)
            # Equal groups of outputs, as few as will do, whose inputs have been and are the same.
            held, width = len(gram), math.gcd(outputs // len(gram), first, (last - first) // len(rows))
            if held < outputs // width:
                gram = gram.repeat_interleave(outputs // width // held, dim=0)
            groups = gram[first // width : last // width]
            if len(rows) < len(groups):
                rows = rows.repeat_interleave(len(groups) // len(rows), dim=0)
            self._add_(groups, rows)
            self._gram[name] = gram
        for name in self._count if not observation.gradients else ():
            self._count[name] += observation.count

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return F^-1 v, by one inversion a layer and one product a row."""
        bar = progress_bar(v.items(), what="products", show=self.progress)
        return {name: self._apply(name, self._inverse(name), x) for name, x in bar}

    def diag(self) -> dict[str, Tensor]:
        """Return the diagonal of F^-1, by one inversion a layer; rows share it."""
        result = {}
        for name, layout in progress_bar(self.layouts.items(), what="diagonal", show=self.progress):
            diagonal = self._inverse(name).diagonal(dim1=1, dim2=2)  # [groups, fan-in]
            result[name] = layout.from_blocks(diagonal.repeat_interleave(layout.num_blocks // len(diagonal), dim=0))
        return result

    @override
    def fisher_diag(self) -> dict[str, Tensor]:
        result = {}
        for name, layout in self.layouts.items():
            moments = self._observed(name).diagonal(dim1=1, dim2=2) / self._count[name]  # [groups, fan-in]
            mean = moments.mean(1, keepdim=True)
            diagonal = moments + self._damping * torch.where(mean > 0, mean, 1)  # as of the inverse
            result[name] = layout.from_blocks(diagonal.repeat_interleave(layout.num_blocks // len(diagonal), dim=0))
        return result

    def blocks(self, name: str) -> Blocks:
        """Compute one inverse for all rows; a convolution with groups has a copy for each row."""
        return Blocks(self._of_rows(name, self._inverse(name)))

    @override
    def factored_blocks(self, name: str) -> Blocks:
        fisher, damping = self._fisher(name)
        # 1 where all inputs are zero.
        fisher.diagonal(dim1=1, dim2=2).add_(torch.where(damping > 0, damping, 1)[:, None])
        factor, factored = inverse_factor(fisher)
        self._check_factored(name, factored)
        return Blocks(self._of_rows(name, factor))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        terms = []
        for name, dw in step.items():
            fisher, damping = self._fisher(name)
            rows = dw.reshape(len(fisher), -1, fisher.shape[1]).to(fisher.dtype)
            force = rows @ fisher + damping[:, None, None] * rows
            terms.append((rows * force).sum(dtype=torch.float64))
        return 0.5 * sum(read(terms))

    def state_dict(self) -> dict[str, Any]:
        """Return sums of a a^T and over how many samples they are."""
        return {"count": dict(self._count), "gram": dict(self._gram)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        counts, grams = (
            curvature_entry(state, "count"),
            curvature_entry(state, "gram"),
        )
        check_names(self._count, counts)
        for name, gram in grams.items():
            if name not in self.layouts:
                raise ValueError(f"expected curvature of {', '.join(self.layouts)}, got that of {name}")
            shape = self._zeros(name).shape[1:]
            if gram.shape[1:] != shape or not gram.dim() or not len(gram) or self._rows[name] % len(gram):
                raise ValueError(f"expected curvature of {name} of shape {['groups', *shape]}, got {list(gram.shape)}")
        self._kept.clear()
        self._count = dict(counts)
        self._gram = {name: gram.to(self._like[name], copy=True) for name, gram in grams.items()}

    @override
    def _merge(self, other: "LayerwiseEstimate") -> None:
        self._kept.clear()
        for name, gram in other._gram.items():
            own = self._gram.get(name)
            if own is None:
                self._gram[name] = gram.to(self._like[name], copy=True)
            else:
                groups = math.lcm(len(own), len(gram))
                finer = (x.to(own.device).repeat_interleave(groups // len(x), dim=0) for x in (own, gram))
                self._gram[name] = sum(finer, torch.zeros((), device=own.device))
        self._count = {name: count + other._count[name] for name, count in self._count.items()}

    def _zeros(self, name: str) -> Tensor:
        """Begin the sums of one group."""
        return self._like[name].new_zeros(1, self._fan_in[name], self._fan_in[name])

    def _add_(self, groups: Tensor, rows: Tensor) -> None:
        """Add those of inputs [groups, n, fan-in] to the sums of groups, in place."""
        ops.block_gram_(groups, rows.transpose(0, 1))  # [n, groups, fan-in]

    def _apply(self, name: str, matrix: Tensor, x: Tensor) -> Tensor:
        """Multiply rows of x by `matrix` [groups, fan-in, fan-in]."""
        rows = x.reshape(len(matrix), -1, matrix.shape[1]).to(matrix.dtype)
        return (rows @ matrix).reshape(x.shape)

    def _fisher(self, name: str) -> tuple[Tensor, Tensor]:
        """Return A and the damping of each group, [groups, fan-in, fan-in] and [groups]."""
        gram = self._observed(name) / self._count[name]
        return gram, self._damping * gram.diagonal(dim1=1, dim2=2).mean(1)

    def _observed(self, name: str) -> Tensor:
        """Return the sum of a a^T of each group, [groups, fan-in, fan-in]."""
        if name not in self._gram:
            raise CurvatureError(
                f"{name}: its layer was not called while the data was read, so it has no inputs; leave it out of params"
            )
        return self._gram[name]

    def _of_rows(self, name: str, matrices: Tensor) -> Tensor:
        """Repeat matrices of groups for each row, but for one that all rows share."""
        rows = self._rows[name]
        return matrices.repeat_interleave(rows // len(matrices), dim=0) if len(matrices) > 1 else matrices

    def _inverse(self, name: str) -> Tensor:
        return self._keeping(name, lambda: (self._inverted(name),))[0]

    def _inverted(self, name: str) -> Tensor:
        fisher, damping = self._fisher(name)
        # In units of its mean diagonal, so that all groups have the same damping; 1 where all inputs are zero.
        scale = torch.where(damping > 0, damping / self._damping, 1)[:, None, None]
        inverse, info = ops.block_inverse(fisher / scale, self._damping)
        self._check_inverted(name, info, self._damping, "second moments of its layer's inputs")
        return inverse / scale
