"""Kronecker-factored curvature: the factors of second moments, and the products that every such model shares."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from fishleg_ext import ops
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import Blocks, Curvature, Estimate

# A symmetric product is computed in panels of so many columns, of more where there would be more panels than that.
PANEL, MOST_PANELS = 256, 8


class Factors(NamedTuple):
    """The factors of one parameter's Q = diag(scale) (P (x) M) diag(scale), both symmetric positive definite.

    Attributes:
        row: P, [o, o]; or its diagonal, [o], where it has no other entries: a diagonal row factor.
        col: M, [i, i].
        scale: [o, i]. None is 1.
    """

    row: Tensor
    col: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True)
class KroneckerCurvature(Curvature):
    """Base class of recipes whose estimates are `KroneckerEstimate`s."""

    conditions_on_masks: ClassVar[bool] = False
    supports_mask: ClassVar[bool] = True
    takes_biases: ClassVar[bool] = True
    default_labels: ClassVar[str] = "model"

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """Cut a block for each row, of fan-in size; a parameter of one dimension is one row."""
        return BlockLayout(weight.shape, matrix_shape(weight)[1])


KroneckerRecipe = TypeVar("KroneckerRecipe", bound=KroneckerCurvature)


class KroneckerEstimate(Estimate[KroneckerRecipe]):
    """F^-1 x = scale * (P (scale * x) M) for each parameter, seen as a matrix x of [o, i] = [out, fan-in].

    There are no entries between parameters. All rows share M, so that row r is a block D_r P_rr M D_r of the inverse,
    D_r = diag(scale_r): one elimination kernel for all rows, of weights divided by the scale and with costs divided by
    P_rr. Rows are compensated separately, which is exact where P is diagonal. The layer's bias is one more column.
    """

    stores_factors: ClassVar[bool] = False  # else `factors` takes an inversion, and memory for as long as they are used

    def __init__(self, recipe: KroneckerRecipe, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._like = {name: weight.new_empty(0, dtype=widened(weight.dtype)) for name, weight in weights.items()}

    @abstractmethod
    def factors(self, name: str) -> Factors:
        """Return P, M and scale of one parameter."""

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return F^-1 v, by two products of matrices a parameter; in one call where factors are there anyway."""
        names = [name for name in v if name in self.layouts]
        groups = [names] if self.stores_factors else [[name] for name in names]
        result: dict[str, Tensor] = {}
        for group in progress_bar(groups, what="products", show=self.progress):
            factors = [self.factors(name) for name in group]
            rows, cols, scales = [f.row for f in factors], [f.col for f in factors], [f.scale for f in factors]
            products = ops.foreach_kron_mul([self._matrix(name, v) for name in group], rows, cols, scales)
            for name, product in zip(group, products, strict=True):
                result |= self._parts(name, product)
        return result

    def diag(self) -> dict[str, Tensor]:
        """Return scale^2 * (diag P outer diag M)."""
        return {
            name: ops.kron_diag(*self.factors(name))[:, : self.layouts[name].block_size].reshape(
                self.layouts[name].shape
            )
            for name in progress_bar(self._factored(), what="diagonal", show=self.progress)
        }

    @override
    def fisher_diag(self) -> dict[str, Tensor]:
        """Return (diag P^-1 outer diag M^-1) / scale^2."""
        result = {}
        for name in self._factored():
            *factors, scale = self.factors(name)
            row, col = (self.invert(name, factor.double(), 0.0) for factor in factors)
            diagonal = ops.kron_diag(row, col, None if scale is None else 1 / scale.double())
            layout = self.layouts[name]
            result[name] = diagonal[:, : layout.block_size].reshape(layout.shape).to(factors[0].dtype)
        return result

    def blocks(self, name: str) -> Blocks:
        """Return M for all rows, and 1 / P_rr for their costs."""
        row, col, scale = self.factors(name)
        return Blocks(col[None], scale, 1 / diagonal_of(row)[:, None])

    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        """Return 1/2 dw^T F dw in float64; dw / scale has the Fisher matrix P^-1 (x) M^-1."""
        terms = []
        for name in [name for name in step if name in self.layouts]:
            row, col, scale = self.factors(name)
            matrix = self._matrix(name, {key: x.double() for key, x in step.items()})
            matrix = Blocks(col[None], scale).scaled(matrix)
            row, col = (self.invert(name, factor.double(), 0.0) for factor in (row, col))
            force = (row[:, None] * matrix if row.dim() == 1 else row @ matrix) @ col
            terms.append((matrix * force).sum())
        return 0.5 * sum(read(terms))

    def invert(self, name: str, matrix: Tensor, damping: float) -> Tensor:
        """Return (matrix + damping I)^-1, computed in float64; a vector stands for the diagonal matrix.

        Raises:
            CurvatureError: it has no inverse even with much more damping.
        """
        if matrix.dim() == 1:
            inverse = (1 / (matrix.double() + damping)).to(matrix.dtype)
            failed = ~(matrix.isfinite() & inverse.isfinite()).all()
            self._check_inverted(name, -failed.int().reshape(1), damping, "Kronecker factors")
            return inverse
        inverse, info = ops.block_inverse(matrix.double()[None], damping)
        self._check_inverted(name, info, damping, "Kronecker factors")
        return inverse[0].to(matrix.dtype)

    def _factored(self) -> list[str]:
        """Names of the parameters that have factors."""
        return list(self.layouts)

    def _has_bias(self, name: str) -> bool:
        return name in self.biases

    def _shape(self, name: str) -> tuple[int, int]:
        """Shape (o, i) of the parameter as a matrix, the bias among the columns."""
        return self.layouts[name].num_blocks, self.layouts[name].block_size + self._has_bias(name)

    def _matrix(self, name: str, v: Mapping[str, Tensor]) -> Tensor:
        """The weight, or each of several, as a matrix [..., o, i] with its bias, or zeros where `v` has none for it."""
        layout, own = self.layouts[name], v[name]
        matrix = own.reshape(-1, layout.num_blocks, layout.block_size)
        if self._has_bias(name):
            bias = v.get(self.biases[name])
            column = matrix.new_zeros(matrix.shape[:2]) if bias is None else bias.reshape(matrix.shape[:2])
            matrix = torch.cat([matrix, column[..., None]], dim=-1)
        return matrix if own.dim() > len(layout.shape) else matrix[0]

    def _parts(self, name: str, matrix: Tensor) -> list[tuple[str, Tensor]]:
        """The inverse of `_matrix`: the weight by its name, and the bias, if there is one, by its own."""
        layout = self.layouts[name]
        weight = name, matrix[:, : layout.block_size].reshape(layout.shape)
        return [weight, (self.biases[name], matrix[:, -1])] if self._has_bias(name) else [weight]


def matrix_shape(weight: Tensor, has_bias: bool = False) -> tuple[int, int]:
    """Shape (out, fan-in) of a parameter as a matrix, a bias as one more column; one of one dimension is a row."""
    cols = max(1, weight[:1].numel() if weight.dim() > 1 else weight.numel())
    return weight.numel() // cols, cols + has_bias


def factor_bytes(shape: tuple[int, int], dtype: torch.dtype, diagonal_rows: bool) -> int:
    """Bytes of the two factors of a matrix, the row factor diagonal or full."""
    rows, cols = shape
    return ((rows if diagonal_rows else rows**2) + cols**2) * widened(dtype).itemsize


def inversion_bytes(shape: tuple[int, int], diagonal_rows: bool) -> int:
    """Bytes that the inversion of a factor takes: five matrices in float64."""
    rows, cols = shape
    return 5 * 8 * max(0 if diagonal_rows else rows**2, cols**2)


def zero_moment(like: Tensor, size: int, diagonal: bool = False) -> Tensor:
    """A second moment of no rows: [size, size], or its diagonal, [size]."""
    return like.new_zeros((size,) if diagonal else (size, size))


def add_moment_(moment: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    """Add alpha * sum over rows x [n, size] of x x^T, or of its diagonal where the moment is a vector."""
    if moment.dim() == 1:
        moment.add_(rows.to(moment.dtype).square().sum(0), alpha=alpha)
    else:
        ops.block_gram_(moment[None], rows[:, None], alpha)


def add_symmetric_product_(moment: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> None:
    """Add alpha * A^T B, which is symmetric, to a moment [size, size]; A and B [n, size].

    Of panels of columns only what is on and below the diagonal is multiplied.
    """
    size = len(moment)
    width = max(PANEL, -(-size // MOST_PANELS))
    for start in range(0, size, width):
        stop = min(start + width, size)
        product = a[:, start:stop].mT @ b[:, :stop]
        moment[start:stop, :stop].add_(product, alpha=alpha)
        moment[:start, start:stop].add_(product[:, :start].mT, alpha=alpha)


def diagonal_of(factor: Tensor) -> Tensor:
    """Return the diagonal of a matrix; a vector is one already."""
    return factor.diagonal() if factor.dim() == 2 else factor
