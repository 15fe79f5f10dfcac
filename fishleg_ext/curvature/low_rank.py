"""The empirical Fisher matrix of all weights at once, as its gradients: M-FAC."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext import ops
from fishleg_ext.common.arguments import checked_count, checked_positive
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.common.settings import setting
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError, Estimate, curvature_entry, load_tensors
from fishleg_ext.observation.types import Observation

COLUMNS = 2048  # of G widened to float64 at a time: 16 MiB for 1,024 gradients
ROWS = 256  # of L at a time: a triangle of so many is solved with, what is left of it is a matrix product


@dataclass(frozen=True)
class LowRankFisher(Curvature):
    """F = damping I + G^T G / m over m gradients, the rows of G [m, d], with every weight correlated with every other.

    Frantar et al., M-FAC, NeurIPS 2021. F^-1 = (I - W^T W) / damping with W = L^-1 G and L the Cholesky factor of
    m damping I + G G^T, [m, m]. W takes the place of G once it is asked for, so that the diagonal is one pass over it
    and a product two; m * d * 4 bytes are held, and no second copy. G G^T, L and W, of which an inverse keeps what is
    left after subtracting from 1, are computed in float64, a few columns at a time.

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
    """Holds all gradients G [m, d], or W in their place once the inverse is asked for."""

    def __init__(self, recipe: LowRankFisher, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._chunks: dict[str, list[Tensor]] = {name: [] for name in weights}  # [chunk, n] each
        self._like = {name: w.new_empty(0, w.numel(), dtype=widened(w.dtype)) for name, w in weights.items()}
        self._factor: Tensor | None = None  # L
        self._is_whitened: set[str] = set()  # names of those that have W in the place of G

    @override
    def update(self, observation: Observation) -> None:
        self._restore_gradients()
        for name, grads in observation.gradients.items():
            # A copy: the observer's tensor may be a view of a larger one, or be written again.
            kept = grads.reshape(len(grads), self.layouts[name].numel).to(self._like[name].dtype, copy=True)
            self._chunks[name].append(kept)

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return (v - W^T W v) / damping; sums over columns in float64."""
        projected: Tensor | float = 0.0
        for name, x in v.items():
            for columns, part in self._columns(name):
                projected = projected + (part @ x.flatten()[columns].to(part.dtype)).double()
        projected = torch.as_tensor(projected)
        result = {}
        for name, x in v.items():
            flat = torch.empty(x.numel(), dtype=self._like[name].dtype, device=x.device)
            for columns, part in self._columns(name):
                flat[columns] = x.flatten()[columns] - projected.to(part) @ part
            result[name] = flat.div_(self.recipe.damping).reshape(x.shape)
        return result

    def diag(self) -> dict[str, Tensor]:
        """Return (1 - |w_i|^2) / damping for each column w_i of W."""
        result = {}
        for name, layout in progress_bar(self.layouts.items(), what="diagonal", show=self.progress):
            flat = torch.empty(layout.numel, dtype=self._like[name].dtype, device=self._like[name].device)
            for columns, part in self._columns(name):
                squares = part.double().square().sum(0)  # several times as fast on a CPU as a norm along rows
                flat[columns] = ((1 - squares) / self.recipe.damping).to(flat.dtype)
            result[name] = flat.reshape(layout.shape)
        return result

    @override
    def fisher_diag(self) -> dict[str, Tensor]:
        """Return damping + |g_i|^2 / m for each column g_i of the gradients, L w_i."""
        result = {}
        for name, layout in self.layouts.items():
            flat = torch.empty(layout.numel, dtype=self._like[name].dtype, device=self._like[name].device)
            held, factor = self._joined(name), self._factor if name in self._is_whitened else None
            for start in range(0, layout.numel, COLUMNS):
                part = held[:, start : start + COLUMNS].double()
                grads = part if factor is None else factor @ part
                squares = grads.square().sum(0) / max(1, len(held))
                flat[start : start + COLUMNS] = (squares + self.recipe.damping).to(flat.dtype)
            result[name] = flat.reshape(layout.shape)
        return result

    def blocks(self, name: str) -> Blocks:
        """Compute (I - W_b^T W_b) / damping for each block b of columns."""
        layout = self.layouts[name]
        size, like = layout.block_size, self._like[name]
        inverse = torch.empty(layout.num_blocks, size, size, dtype=like.dtype, device=like.device)
        step = max(1, COLUMNS // size)
        whitened = self._whitened(name)
        identity = torch.eye(size, dtype=torch.float64, device=like.device)
        for start in range(0, layout.num_blocks, step):
            part = whitened[:, start * size : (start + step) * size].double()
            part = torch.nn.functional.pad(part, (0, -part.shape[1] % size))
            part = part.unflatten(1, (-1, size)).transpose(0, 1)  # [blocks, m, B]
            inverse[start : start + step] = (identity - part.mT @ part) / self.recipe.damping
        return Blocks(inverse)

    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        """Return 1/2 (damping |dw|^2 + |G dw|^2 / m), G dw being L W dw."""
        product: Tensor | float = 0.0
        squares, m = [], 1
        for name, dw in step.items():
            flat = dw.flatten()
            squares.append(flat.double().square().sum())
            for columns, part in self._columns(name):
                product, m = product + (part @ flat[columns].to(part.dtype)).double(), len(part)
        whitened = torch.zeros(())
        if isinstance(product, Tensor) and self._factor is not None:
            whitened = (self._factor @ product).square().sum()
        *norms, squared = read([*squares, whitened])
        return 0.5 * (self.recipe.damping * sum(norms) + squared / max(1, m))

    def state_dict(self) -> dict[str, Any]:
        """Return all gradients, [m, n] for each parameter; or W, and the factor it was made with."""
        if self._factor is not None:
            self._whiten()
        return {"gradients": {name: self._joined(name) for name in self._chunks}, "factor": self._factor}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        saved = curvature_entry(state, "gradients")
        counts = {len(grads) for grads in saved.values()}
        if len(counts) > 1:
            raise ValueError(f"expected as many gradients of every parameter, got {sorted(counts)}")
        kept = {name: like.new_empty(max(counts, default=0), like.shape[1]) for name, like in self._like.items()}
        load_tensors(kept, saved)
        self._chunks = {name: [grads] for name, grads in kept.items()}
        factor = state.get("factor")  # which states of 0.1 do not have
        self._factor = None if factor is None else factor.to(next(iter(kept.values())).device, copy=True)
        self._is_whitened = set() if factor is None else set(kept)

    @override
    def _merge(self, other: "LowRankEstimate") -> None:
        self._restore_gradients()
        for name in self._chunks:
            self._chunks[name].append(other._gradients(name).to(self._like[name], copy=True))

    def _joined(self, name: str) -> Tensor:
        """Join the chunks of one parameter, [m, n]."""
        chunks = self._chunks[name]
        if len(chunks) != 1:  # join them once
            self._chunks[name] = chunks = [torch.cat([self._like[name], *chunks])]
        return chunks[0]

    def _whitened(self, name: str) -> Tensor:
        """Return W of one parameter, [m, n]."""
        self._whiten()
        return self._joined(name)

    def _whiten(self) -> None:
        """Put W in the place of G; of one parameter after the other, so that no second copy of all is held."""
        if self._factor is None:
            self._factor = self._cholesky()
        solve = functools.partial(_solved, self._factor)
        rest = [name for name in self._chunks if name not in self._is_whitened]
        for name in progress_bar(rest, what="whitening", show=self.progress) if rest else ():
            self._chunks[name] = [self._multiplied(name, solve)]
            self._is_whitened.add(name)

    def _restore_gradients(self) -> None:
        """Put G = L W in the place of W. Each way is rounded once."""
        for name in list(self._is_whitened):
            self._chunks[name] = [self._gradients(name)]
            self._is_whitened.remove(name)
        self._factor = None

    def _gradients(self, name: str) -> Tensor:
        """Return G of one parameter, [m, n]."""
        factor = self._factor
        if factor is None or name not in self._is_whitened:
            return self._joined(name)
        return self._multiplied(name, lambda part: factor @ part)

    def _multiplied(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a function of what is held of one parameter, computed in float64, some columns at a time."""
        held = self._joined(name)
        result = torch.empty_like(held)
        for start in range(0, held.shape[1], COLUMNS):
            result[:, start : start + COLUMNS] = function(held[:, start : start + COLUMNS].double())
        return result

    def _columns(self, name: str) -> Iterator[tuple[slice, Tensor]]:
        """Yield W of one parameter, a few columns at a time, so that sums are of few numbers."""
        whitened = self._whitened(name)
        for start in range(0, whitened.shape[1], COLUMNS):
            columns = slice(start, start + COLUMNS)
            yield columns, whitened[:, columns]

    def _cholesky(self) -> Tensor:
        """Return the Cholesky factor of C, [m, m], float64."""
        gram: Tensor | None = None
        for name in progress_bar(self._chunks, what="gradient products", show=self.progress):
            held = self._joined(name)
            if gram is None:
                gram = torch.zeros(1, len(held), len(held), dtype=torch.float64, device=held.device)
            for start in range(0, held.shape[1], COLUMNS):
                part = held[:, start : start + COLUMNS].double()
                if part.device.type == "cpu":  # where one half is computed
                    ops.block_gram_(gram, part.T[:, None])
                else:
                    gram[0].addmm_(part, part.T)
        if gram is None:
            raise CurvatureError("low_rank has no weights")
        gram = gram[0]
        gram.diagonal().add_(len(gram) * self.recipe.damping)
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            names = ", ".join(self._chunks)
            raise CurvatureError(
                f"the low-rank Fisher of {names} is not positive definite with damping {self.recipe.damping:g}"
            )
        return factor


def _solved(factor: Tensor, columns: Tensor) -> Tensor:
    """Solve L W = G."""
    result = torch.empty_like(columns)
    for start in range(0, len(factor), ROWS):
        rows = slice(start, start + ROWS)
        rest = columns[rows].addmm(factor[rows, :start], result[:start], alpha=-1)
        result[rows] = torch.linalg.solve_triangular(factor[rows, rows], rest, upper=False)
    return result
