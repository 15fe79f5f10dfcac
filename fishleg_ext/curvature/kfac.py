"""K-FAC: Kronecker factors of layer inputs and output gradients, or of gradients."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.arguments import checked_damping
from fishleg_ext.curvature.base import CurvatureError, load_tensors, state_entry
from fishleg_ext.curvature.kronecker import (
    Factors,
    KroneckerInverse,
    add_moment_,
    diagonal_of,
    factor_bytes,
    inversion_bytes,
    zero_moment,
)
from fishleg_ext.observation.types import Observation


class Kronecker(KroneckerInverse):
    """F = (S + sqrt(damping) / pi I) (x) (A + pi sqrt(damping) I) for each parameter, with factors of two kinds.

    "layers", K-FAC: A = E sum_t a_t a_t^T of the layer's inputs and S = E mean_t d_t d_t^T of the gradients by its
    outputs, over positions t (one, for a Linear layer of vectors). Martens and Grosse, arXiv 1503.05671; Grosse and
    Martens for convolutions, arXiv 1602.01407. For Linear and Conv layers; a convolution with groups has the mean of
    their A.

    "gradients": A = E[G^T G] / E|G|^2 and S = E[G G^T] of per-sample gradients G [out, fan-in], which makes the trace
    exact. For any parameter.

    pi = sqrt(mean diag A / mean diag S) damps both factors by the same share.

    Structures: "rows" keeps the diagonal of S alone, so that rows do not make up for each other, as in exact
    elimination, which compensates within a row; "kronecker" keeps all of it.

    Args:
        damping: in the units of a squared gradient, > 0.
        factors: "layers" or "gradients".
        structure: "rows" or "kronecker".
    """

    def __init__(self, damping: float = 1e-6, factors: str = "layers", structure: str = "rows") -> None:
        super().__init__()
        self.damping = checked_damping(damping, positive=True)
        if factors not in ("layers", "gradients"):
            raise ValueError(f"expected factors to be 'layers' or 'gradients', got {factors!r}")
        if structure not in ("rows", "kronecker"):
            raise ValueError(f"expected structure to be 'rows' or 'kronecker', got {structure!r}")
        self.kind, self.structure = factors, structure

    @property
    def block_diagonal(self) -> bool:  # type: ignore[override]
        """With rows apart."""
        return self.structure == "rows"

    @property
    def observes(self) -> frozenset[str]:  # type: ignore[override]
        """Layer inputs and output gradients, or gradients."""
        return frozenset({"gradients"} if self.kind == "gradients" else {"inputs", "output_gradients"})

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Zero moments."""
        super().start(weights)
        self._moments = {
            name: Factors(zero_moment(like, rows, self.block_diagonal), zero_moment(like, cols))
            for name, like in self._like.items()
            for rows, cols in [self._shape(name)]
        }
        self._counts = {name: [0, 0] for name in weights}  # of what went into S and A

    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """S and A."""
        return factor_bytes(self._matrix_shape(name, weight), weight.dtype, self.block_diagonal)

    def workspace_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """Both factors, and the inversion of the larger."""
        shape, apart = self._matrix_shape(name, weight), self.block_diagonal
        return factor_bytes(shape, weight.dtype, apart) + inversion_bytes(shape, apart)

    def update(self, observation: Observation) -> None:
        """Add second moments."""
        for name in self.layouts if observation.gradients else ():
            matrices = self._matrix(name, observation.gradients)
            row, col, _ = self._moments[name]
            add_moment_(row, matrices.mT.reshape(-1, len(row)))
            add_moment_(col, matrices.reshape(-1, len(col)))
            self._counts[name] = [count + observation.count for count in self._counts[name]]
        for name, rows in observation.output_gradients.items():
            add_moment_(self._moments[name].row, rows)
            self._counts[name][0] += len(rows)
        for name, rows in observation.inputs.items():
            groups = len(rows) if rows.dim() == 3 else 1
            rows = rows.reshape(-1, rows.shape[-1])
            if self._has_bias(name):  # it is multiplied by 1
                rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
            add_moment_(self._moments[name].col, rows, 1 / groups)
            self._counts[name][1] += observation.count

    def factors(self, name: str) -> Factors:
        """The inverses of the damped moments; computed at each call."""
        if not all(self._counts[name]):
            raise CurvatureError(
                f"{name}: its layer was not called while the data was read, or the loss does not depend on it; "
                "leave it out of params"
            )
        sums = self._moments[name]
        row, col = (moment / count for moment, count in zip(sums[:2], self._counts[name], strict=True))
        if self.kind == "gradients":
            col /= float(diagonal_of(row).sum()) or 1.0
        # Damped by the same share each: a factor that is all zero has no scale.
        pi = ((float(diagonal_of(col).mean()) or 1.0) / (float(diagonal_of(row).mean()) or 1.0)) ** 0.5
        damping = self.damping**0.5
        return Factors(self.invert(name, row, damping / pi), self.invert(name, col, damping * pi))

    def state_dict(self) -> dict[str, Any]:
        """Sums of outer products and their counts."""
        return {
            "factors": self.kind,
            "structure": self.structure,
            "counts": {name: list(counts) for name, counts in self._counts.items()},
            "row": {name: moments.row for name, moments in self._moments.items()},
            "col": {name: moments.col for name, moments in self._moments.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        if (kind := state_entry(state, "factors")) != self.kind:
            raise ValueError(f"expected the state of Kronecker(factors={self.kind!r}), got that of {kind!r}")
        if (structure := state_entry(state, "structure")) != self.structure:
            raise ValueError(f"expected the state of structure {self.structure!r}, got that of {structure!r}")
        for part in ("row", "col"):
            load_tensors({name: getattr(m, part) for name, m in self._moments.items()}, state_entry(state, part))
        self._counts = {name: list(counts) for name, counts in state_entry(state, "counts").items()}
