"""K-FAC: Kronecker factors of layer inputs and output gradients, or of gradients."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext.common.arguments import checked_positive, one_of
from fishleg_ext.common.settings import setting
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import CurvatureError, curvature_entry, load_tensors
from fishleg_ext.curvature.kronecker import (
    Factors,
    KroneckerCurvature,
    KroneckerEstimate,
    add_moment_,
    diagonal_of,
    factor_bytes,
    inversion_bytes,
    matrix_shape,
    zero_moment,
)
from fishleg_ext.observation.types import Observation


@dataclass(frozen=True)
class Kronecker(KroneckerCurvature):
    """F = (S + sqrt(damping) / pi I) (x) (A + pi sqrt(damping) I) for each parameter, with factors of two kinds.

    "layers", K-FAC: A = E sum_t a_t a_t^T of the layer's inputs and S = E mean_t d_t d_t^T of the gradients by its
    outputs, over positions t (one, for a Linear layer of vectors). Martens and Grosse, arXiv 1503.05671; Grosse and
    Martens for convolutions, arXiv 1602.01407. For Linear and Conv layers; a convolution with groups has the mean of
    their A.

    "gradients": A = E[G^T G] / E|G|^2 and S = E[G G^T] of per-sample gradients G [out, fan-in], which makes the trace
    exact. For any parameter.

    pi = sqrt(mean diag A / mean diag S) damps both factors by the same share.

    Structures: "rows" keeps the diagonal of S alone, a diagonal row factor, so that rows do not compensate for each
    other, as in exact elimination, which compensates within a row; "kronecker" keeps all of it.

    Args:
        damping: in the units of a squared gradient, > 0.
        factors: "layers" or "gradients".
        structure: "rows" or "kronecker".
    """

    damping: float = setting(1e-6, checked_positive)
    factors: str = setting("layers", one_of("layers", "gradients"))
    structure: str = setting("rows", one_of("rows", "kronecker"))

    name: ClassVar[str] = "kronecker"

    @property
    @override
    def block_diagonal(self) -> bool:  # type: ignore[override]
        return self.structure == "rows"

    @property
    @override
    def observes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"gradients"} if self.factors == "gradients" else {"inputs", "output_gradients"})

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "KfacEstimate":
        return KfacEstimate(self, weights, biases, **options)

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count S and A."""
        return factor_bytes(matrix_shape(weight, has_bias), weight.dtype, self.block_diagonal)

    def workspace_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count both factors, and the inversion of the larger."""
        shape = matrix_shape(weight, has_bias)
        return factor_bytes(shape, weight.dtype, self.block_diagonal) + inversion_bytes(shape, self.block_diagonal)


class KfacEstimate(KroneckerEstimate[Kronecker]):
    """Sums of the outer products that S and A are the means of."""

    def __init__(self, recipe: Kronecker, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._moments: dict[str, Factors] = {}
        for name, like in self._like.items():
            rows, cols = self._shape(name)
            self._moments[name] = Factors(zero_moment(like, rows, recipe.block_diagonal), zero_moment(like, cols))
        self._counts: dict[str, list[float]] = {name: [0, 0] for name in weights}  # of what went into S and A
        self._means: dict[str, tuple[float, float]] = {}

    @override
    def update(self, observation: Observation) -> None:
        self._forget()
        for name in self.layouts if observation.gradients else ():
            matrices = self._matrix(name, observation.gradients)
            row, col, _ = self._moments[name]
            add_moment_(row, matrices.mT.reshape(-1, len(row)))
            add_moment_(col, matrices.reshape(-1, len(col)))
            self._counts[name] = [count + observation.count for count in self._counts[name]]
        for name, (rows, (first, last)) in observation.output_gradients.items():
            row, n = self._moments[name].row, rows.shape[1]
            for index, part in enumerate(rows):  # of outputs that have inputs of their own
                start = first + index * part.shape[1]
                own = slice(start, start + part.shape[1])
                add_moment_(row[own] if row.dim() == 1 else row[own, own], part)
            self._counts[name][0] += n * (last - first) / len(row)
        for name, (rows, (first, last)) in observation.inputs.items():
            share = (last - first) / len(self._moments[name].row) / len(rows)  # the mean over outputs
            rows = rows.flatten(0, 1)
            if self._has_bias(name):  # it is multiplied by 1
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            add_moment_(self._moments[name].col, rows, share)
        for name in self.layouts if not observation.gradients else ():
            self._counts[name][1] += observation.count

    def factors(self, name: str) -> Factors:
        """Compute the inverses of the damped moments."""
        return self._keeping(name, lambda: self._inverted(name))

    def _inverted(self, name: str) -> Factors:
        if not all(self._counts[name]):
            raise CurvatureError(
                f"{name}: its layer was not called while the data was read, or the loss does not depend on it; "
                "leave it out of params"
            )
        sums = self._moments[name]
        row, col = (moment / count for moment, count in zip(sums[:2], self._counts[name], strict=True))
        row_mean, col_mean = self._mean_diagonals()[name]
        if self.recipe.factors == "gradients":
            trace = row_mean * len(row) or 1.0
            col, col_mean = col / trace, col_mean / trace
        # Damped by the same share each: a factor that is all zero has no scale.
        pi = ((col_mean or 1.0) / (row_mean or 1.0)) ** 0.5
        damping = self.recipe.damping**0.5
        return Factors(self.invert(name, row, damping / pi), self.invert(name, col, damping * pi))

    def _forget(self) -> None:
        """Drop what was derived from other sums."""
        self._kept.clear()
        self._means = {}

    def _mean_diagonals(self) -> dict[str, tuple[float, float]]:
        """Name -> means of the diagonals of S and A, read at once for all parameters."""
        if not self._means:
            sums = [diagonal_of(x).double().mean() for moments in self._moments.values() for x in moments[:2]]
            counts = [max(count, 1e-300) for counts in self._counts.values() for count in counts]
            means = iter([total / count for total, count in zip(read(sums), counts, strict=True)])
            self._means = {name: (next(means), next(means)) for name in self._moments}
        return self._means

    def state_dict(self) -> dict[str, Any]:
        """Return sums of outer products and their counts."""
        return {
            "factors": self.recipe.factors,
            "structure": self.recipe.structure,
            "counts": {name: list(counts) for name, counts in self._counts.items()},
            "row": {name: moments.row for name, moments in self._moments.items()},
            "col": {name: moments.col for name, moments in self._moments.items()},
        }

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._forget()
        for setting_name in ("factors", "structure"):
            own, saved = getattr(self.recipe, setting_name), curvature_entry(state, setting_name)
            if saved != own:
                raise ValueError(f"expected the state of Kronecker({setting_name}={own!r}), got that of {saved!r}")
        for part in ("row", "col"):
            load_tensors(
                {name: getattr(m, part) for name, m in self._moments.items()},
                curvature_entry(state, part),
            )
        self._counts = {name: list(counts) for name, counts in curvature_entry(state, "counts").items()}

    @override
    def _merge(self, other: "KfacEstimate") -> None:
        self._forget()
        for name, moments in self._moments.items():
            for own, theirs in zip(moments[:2], other._moments[name][:2], strict=True):
                own += theirs.to(own.device)
            self._counts[name] = [a + b for a, b in zip(self._counts[name], other._counts[name], strict=True)]
