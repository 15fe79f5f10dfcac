"""The empirical Fisher matrix of all weights at once, as its gradients: M-FAC."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext.common.arguments import checked_count, checked_positive
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.common.settings import setting
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError, Estimate, curvature_entry, load_tensors
from fishleg_ext.observation.types import Observation

# Columns of G widened to float64 at a time: 64 MiB for 1,024 gradients.
COLUMNS = 8192


@dataclass(frozen=True)
class LowRankFisher(Curvature):
    """F = damping I + G^T G / m over m gradients, the rows of G [m, d], with every weight correlated with every other.

    Frantar et al., M-FAC, NeurIPS 2021. F^-1 = (I - G^T C^-1 G) / damping with C = m damping I + G G^T, by one m x m
    Cholesky factorisation. Holds all gradients, m * d * 4 bytes. What is left of a weight's inverse after
    subtracting from 1 can be as small as 1 / cond(F), so these products are taken in float64, a few columns at a time.

    Args:
        block_size: of the diagonal blocks of F^-1 that exact elimination takes; blocks are compensated separately.
        damping: added to the diagonal, > 0, in the units of a squared gradient.
    """

    block_size: int = setting(128, checked_count)
    damping: float = setting(1e-5, checked_positive)

    name: ClassVar[str] = "low_rank"
    block_diagonal: ClassVar[bool] = False
    per_parameter: ClassVar[bool] = False
    default_saliency: ClassVar[str] = "simultaneous"

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Cut blocks of block_size."""
        return BlockLayout(weight.shape, self.block_size)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "LowRankEstimate":
        return LowRankEstimate(self, weights, biases, **options)

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count every gradient."""
        return num_grads * weight.numel() * widened(weight.dtype).itemsize


class LowRankEstimate(Estimate[LowRankFisher]):
    """All gradients G [m, d], and the Cholesky factor of C once it is asked for."""

    def __init__(self, recipe: LowRankFisher, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in weights}  # [chunk, n] each
        self._like = {name: w.new_empty(0, w.numel(), dtype=widened(w.dtype)) for name, w in weights.items()}
        self._factor: Tensor | None = None
        self._diagonal: dict[str, Tensor] | None = None

    @override
    def update(self, observation: Observation) -> None:
        for name, grads in observation.gradients.items():
            # A copy: the observer's tensor may be a view of a larger one, or be written again.
            kept = grads.flatten(1).to(self._like[name].dtype, copy=True)
            self._chunks[name].append(kept)
        self._forget_derived()

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (v - G^T C^-1 G v) / damping."""
        factor = self._cholesky()
        projected = torch.zeros(len(factor), dtype=torch.float64, device=factor.device)
        for name, x in v.items():
            for columns, part in self._columns(name):
                projected += part @ x.flatten()[columns].double()
        solved = torch.cholesky_solve(projected[:, None], factor)[:, 0]
        result = {}
        for name, x in v.items():
            flat = torch.empty(x.numel(), dtype=self._like[name].dtype, device=x.device)
            for columns, part in self._columns(name):
                flat[columns] = (x.flatten()[columns].double() - solved @ part) / self.recipe.damping
            result[name] = flat.reshape(x.shape)
        return result

    def diag(self) -> dict[str, Tensor]:
        """Return (1 - |L^-1 g_i|^2) / damping for each column g_i of G, with L the Cholesky factor of C.

        m^2 operations a weight, so the result is kept.
        """
        if self._diagonal is None:
            self._diagonal = self._compute_diagonal()
        return dict(self._diagonal)

    def blocks(self, name: str) -> Blocks:
        """Compute (I - (L^-1 G_b)^T (L^-1 G_b)) / damping for each block b of columns."""
        factor, layout = self._cholesky(), self.layouts[name]
        size, like = layout.block_size, self._like[name]
        inverse = torch.empty(layout.num_blocks, size, size, dtype=like.dtype, device=like.device)
        step = max(1, COLUMNS // size)
        grads = self._gradients(name)
        identity = torch.eye(size, dtype=torch.float64, device=like.device)
        for start in range(0, layout.num_blocks, step):
            part = grads[:, start * size : (start + step) * size].double()
            part = torch.nn.functional.pad(part, (0, -part.shape[1] % size))
            whitened = torch.linalg.solve_triangular(factor, part, upper=False)
            whitened = whitened.unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, m, B]
            inverse[start : start + step] = (identity - whitened.mT @ whitened) / self.recipe.damping
        return Blocks(inverse)

    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        """Return 1/2 (damping |dw|^2 + |G dw|^2 / m)."""
        product: Tensor | float = 0.0
        norm, m = 0.0, 1
        for name, dw in step.items():
            flat = dw.flatten().double()
            norm += float(flat.square().sum())
            for columns, part in self._columns(name):
                product, m = product + part @ flat[columns], len(part)
        return 0.5 * (self.recipe.damping * norm + float(torch.as_tensor(product).square().sum()) / max(1, m))

    def state_dict(self) -> dict[str, Any]:
        """Return all gradients, [m, n] for each parameter."""
        return {"gradients": {name: self._gradients(name) for name in self._chunks}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = curvature_entry(state, "gradients")
        counts = {len(grads) for grads in saved.values()}
        if len(counts) > 1:
            raise ValueError(f"expected as many gradients of every parameter, got {sorted(counts)}")
        kept = {name: like.new_empty(max(counts, default=0), like.shape[1]) for name, like in self._like.items()}
        load_tensors(kept, saved)
        self._chunks = {name: [grads] for name, grads in kept.items()}
        self._forget_derived()

    @override
    def _merge(self, other: "LowRankEstimate") -> None:
        for name in self._chunks:
            self._chunks[name].append(other._gradients(name).to(self._like[name], copy=True))
        self._forget_derived()

    def _forget_derived(self) -> None:
        """Drop what was derived from other gradients."""
        self._factor = None
        self._diagonal = None

    def _gradients(self, name: str) -> Tensor:
        """Join the gradients of one parameter, [m, n]."""
        chunks = self._chunks[name]
        if len(chunks) != 1:  # join them once
            self._chunks[name] = chunks = [torch.cat([self._like[name], *chunks])]
        return chunks[0]

    def _columns(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield the gradients of one parameter in float64, a few columns at a time."""
        grads = self._gradients(name)
        for start in range(0, grads.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            yield columns, grads[:, columns].double()

    def _compute_diagonal(self) -> dict[str, Tensor]:
        factor = self._cholesky()
        result = {}
        for name, layout in progress_bar(self.layouts.items(), what="diagonal", show=self.progress):
            flat = torch.empty(layout.numel, dtype=self._like[name].dtype, device=factor.device)
            for columns, part in self._columns(name):
                whitened = torch.linalg.solve_triangular(factor, part, upper=False)
                flat[columns] = (1 - whitened.square().sum(0)) / self.recipe.damping
            result[name] = flat.reshape(layout.shape)
        return result

    def _cholesky(self) -> Tensor:
        """Return the Cholesky factor of C, [m, m], float64."""
        if self._factor is None:
            gram: Tensor | None = None
            for name in progress_bar(self._chunks, what="gradient products", show=self.progress):
                for _, part in self._columns(name):
                    gram = part @ part.mT if gram is None else gram.addmm_(part, part.mT)
            if gram is None:
                raise CurvatureError("low_rank has no weights")
            gram.diagonal().add_(len(gram) * self.recipe.damping)
            self._factor, failed = torch.linalg.cholesky_ex(gram)
            if failed:
                self._factor = None
                names = ", ".join(self._chunks)
                raise CurvatureError(
                    f"the low-rank Fisher of {names} is not positive definite with damping {self.recipe.damping:g}"
                )
        return self._factor
