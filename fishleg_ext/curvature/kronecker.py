"""Kronecker-factored curvature: the products that every such model shares."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Optional

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.dtypes import ieee_products, widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError

# Of the conjugate gradients that find the joint cost: at most so many steps, or until one gains less than this share.
JOINT_STEPS = 100
JOINT_TOLERANCE = 1e-8


class Factors(NamedTuple):
    """The factors of one parameter's Q = diag(scale) (P (x) M) diag(scale), both symmetric positive definite.

    Attributes:
        row: P, [o, o], or its diagonal, [o], where it has no other entries.
        col: M, [i, i].
        scale: [o, i]. None is 1.
    """

    row: Tensor
    col: Tensor
    scale: Optional[Tensor] = None


class KroneckerInverse(Curvature):
    """F^-1 x = scale * (P (scale * x) M) for each parameter, seen as a matrix x of [o, i] = [out, fan-in].

    There are no entries between parameters. All rows share M, so that row r is a block D_r P_rr M D_r of the inverse,
    D_r = diag(scale_r): one elimination kernel for all rows, of weights divided by the scale and with costs divided by
    P_rr. Rows are compensated separately, which is exact where P is diagonal. The layer's bias is one more column.
    """

    masked: ClassVar[bool] = False
    maskable: ClassVar[bool] = True
    takes_biases: ClassVar[bool] = True
    stores_factors: ClassVar[bool] = False  # else `factors` takes an inversion, and memory for as long as they are used
    default_labels: ClassVar[str] = "model"

    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """A block for each row, of fan-in size; the whole of a parameter of one dimension."""
        return BlockLayout(weight.shape, matrix_shape(weight)[1])

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Note shapes and dtypes."""
        super().start(weights)
        self._like = {name: weight.new_empty(0, dtype=widened(weight.dtype)) for name, weight in weights.items()}

    @abstractmethod
    def factors(self, name: str) -> Factors:
        """P, M and scale of one parameter."""

    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Two products of matrices for each, in one call where factors are there anyway."""
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
        """scale^2 * (diag P outer diag M)."""
        return {
            name: ops.kron_diag(*self.factors(name))[:, : self.layouts[name].block_size].reshape(
                self.layouts[name].shape
            )
            for name in progress_bar(self._factored(), what="diagonal", show=self.progress)
        }

    def blocks(self, name: str) -> Blocks:
        """M for all rows, and 1 / P_rr for their costs."""
        row, col, scale = self.factors(name)
        return Blocks(col[None], scale, 1 / diagonal_of(row)[:, None])

    def joint_cost(self, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> float:
        """1/2 dw^T F dw of the best step that zeroes P, where dw / scale has the Fisher matrix P^-1 (x) M^-1.

        Where rows make up for each other by conjugate gradients from the best step of each row alone, so never more
        than that costs.
        """
        total = 0.0
        for name, weight in progress_bar(weights.items(), what="joint cost", show=self.progress):
            row, col, scale = self.factors(name)
            row, col = row.double(), col.double()
            matrix, gone = (self._matrix(name, {name: x}) for x in (weight.double(), pruned[name]))
            matrix = Blocks(col[None], scale).scaled(matrix)
            step = ops.obs_compensate(matrix, col[None], gone) - matrix
            col = self.invert(name, col, 0.0)
            if row.dim() == 1:
                total += 0.5 * float((step @ col * step / row[:, None]).sum())
            else:
                total += _least_cost(Factors(self.invert(name, row, 0.0), col), step, gone)
        return total

    def invert(self, name: str, matrix: Tensor, damping: float) -> Tensor:
        """(matrix + damping I)^-1, in float64 inside; of a vector, that of the diagonal matrix, as a vector.

        Raises:
            CurvatureError: it has no inverse even with much more damping.
        """
        if matrix.dim() == 1:
            inverse = (1 / (matrix.double() + damping)).to(matrix.dtype)
            if not (matrix.isfinite() & inverse.isfinite()).all():
                raise CurvatureError(f"{name}: its Kronecker factors cannot be inverted; use more damping")
            return inverse
        inverse, info = ops.block_inverse(matrix.double()[None], damping)
        if (info < 0).any():
            raise CurvatureError(f"{name}: its Kronecker factors cannot be inverted; use more damping")
        if (info > 0).any():
            self.damping_raised[name] = 1
        return inverse[0].to(matrix.dtype)

    def _factored(self) -> list[str]:
        """The parameters that have factors."""
        return list(self.layouts)

    def _has_bias(self, name: str) -> bool:
        return name in self.biases

    def _matrix_shape(self, name: str, weight: Tensor) -> tuple[int, int]:
        """What `_shape` will be, before `start`."""
        rows, cols = matrix_shape(weight)
        return rows, cols + self._has_bias(name)

    def _shape(self, name: str) -> tuple[int, int]:
        """Of the parameter as a matrix, (o, i), the bias among the columns."""
        return self.layouts[name].num_blocks, self.layouts[name].block_size + self._has_bias(name)

    def _matrix(self, name: str, v: Mapping[str, Tensor]) -> Tensor:
        """The weight, or each of several, as a matrix [..., o, i] with its bias, or zeros where `v` has none for it."""
        layout = self.layouts[name]
        matrix = v[name].reshape(-1, layout.num_blocks, layout.block_size)
        if self._has_bias(name):
            bias = v.get(self.biases[name])
            column = matrix.new_zeros(matrix.shape[:2]) if bias is None else bias.reshape(matrix.shape[:2])
            matrix = torch.cat([matrix, column[..., None]], dim=-1)
        return matrix if v[name].dim() > len(layout.shape) else matrix[0]

    def _parts(self, name: str, matrix: Tensor) -> list[tuple[str, Tensor]]:
        """The inverse of `_matrix`: the weight by its name, and the bias, if there is one, by its own."""
        layout = self.layouts[name]
        weight = name, matrix[:, : layout.block_size].reshape(layout.shape)
        return [weight, (self.biases[name], matrix[:, -1])] if self._has_bias(name) else [weight]


def factor_bytes(shape: tuple[int, int], dtype: torch.dtype, apart: bool) -> int:
    """Bytes of the two factors of a matrix, that of rows diagonal if they are apart."""
    rows, cols = shape
    return ((rows if apart else rows**2) + cols**2) * widened(dtype).itemsize


def inversion_bytes(shape: tuple[int, int], apart: bool) -> int:
    """Bytes that the inversion of a factor takes: five matrices in float64."""
    rows, cols = shape
    return 5 * 8 * max(0 if apart else rows**2, cols**2)


def zero_moment(like: Tensor, size: int, diagonal: bool = False) -> Tensor:
    """No second moment yet: [size, size], or its diagonal."""
    return like.new_zeros((size,) if diagonal else (size, size))


def add_moment_(moment: Tensor, rows: Tensor, alpha: float = 1.0) -> None:
    """moment += alpha * sum over rows x [n, size] of x x^T, or of its diagonal where the moment is a vector."""
    if moment.dim() == 1:
        moment.add_(rows.to(moment.dtype).square().sum(0), alpha=alpha)
    else:
        rows = rows.to(moment.dtype)
        with ieee_products():
            moment.addmm_(rows.mT, rows, alpha=alpha)


def diagonal_of(factor: Tensor) -> Tensor:
    """Of a matrix, or of a diagonal one that is kept as a vector."""
    return factor.diagonal() if factor.dim() == 2 else factor


def matrix_shape(weight: Tensor) -> tuple[int, int]:
    """A parameter as a matrix, (out, fan-in); one of one dimension is a row."""
    cols = max(1, weight[:1].numel() if weight.dim() > 1 else weight.numel())
    return weight.numel() // cols, cols


def _least_cost(fisher: Factors, step: Tensor, fixed: Tensor) -> float:
    """min 1/2 dw^T F dw over what is not fixed, F = row (x) col, from a first step; Jacobi-preconditioned."""
    row, col, _ = fisher
    precision = 1 / torch.outer(row.diagonal(), col.diagonal())
    force = row @ step @ col
    cost = 0.5 * (step * force).sum()
    residual = torch.where(fixed, 0, -force)
    direction = precision * residual
    product = (residual * direction).sum()
    for _ in range(JOINT_STEPS):
        if product <= 0:
            break
        curved = row @ direction @ col
        length = product / (direction * curved).sum()
        gain = 0.5 * length * product
        cost -= gain
        if gain <= JOINT_TOLERANCE * cost:
            break
        residual -= length * torch.where(fixed, 0, curved)
        scaled = precision * residual
        product, before = (residual * scaled).sum(), product
        direction = scaled + product / before * direction
    return float(cost)
