"""Learns the two factors of one parameter's inverse, as FishLeg has it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.dtypes import ieee_products
from fishleg_ext.curvature.kronecker import Factors, add_moment_, add_symmetric_product_, diagonal_of, zero_moment
from fishleg_ext.observation.gradient_factors import GradientFactors
from fishleg_ext.observation.types import Observation

LEARNED_TENSORS = ("row", "col", "row_moment", "col_moment", "trace")
# M is computed anew by every batch whose moments take as many operations as that (over i^3, in float64), and else once
# there are so many times the gradients of the last time.
INVERSION, GROWTH = 5, 1.5
# The lengths |M g_r|, of which a diagonal row factor is made, are measured along i / DIRECTIONS random directions, or
# LEAST_DIRECTIONS if these are more; along others in each batch.
DIRECTIONS, LEAST_DIRECTIONS = 8, 64


def moment_operations(rows: int, cols: int, positions: int | None = None) -> int:
    """Count the operations of both moments of one gradient [rows, cols], in factors of so many positions, or dense."""
    directions = num_directions(cols)
    if positions is None:
        return rows * cols**2 + 2 * rows * cols * directions
    return 2 * positions * cols * (cols + directions) + 2 * positions**2 * (2 * rows + cols + directions)


def num_directions(cols: int) -> int:
    """Count the directions along which lengths of `cols` numbers are measured."""
    return min(cols, max(LEAST_DIRECTIONS, cols // DIRECTIONS))


def random_directions(size: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return orthogonal directions [size, `num_directions`] with E |v directions|^2 = |v|^2, for size > their number.

    They are columns of a cosine transform, drawn among all but the constant one, whose rows have random signs. Unlike
    those of a random rotation they need no factorisation, but a lookup.
    """
    number = num_directions(size)
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randperm(size - 1, generator=generator)[:number].to(device) + 1
    signs = torch.randint(2, (size, 1), generator=generator).to(device)
    # Column k is cos(pi (2j + 1) k / 2 size): 4 size steps are a turn, and half a turn is a change of sign.
    steps = (torch.arange(1, 2 * size, 2, device=device)[:, None] * frequencies + 2 * size * signs) % (4 * size)
    turn = torch.arange(4 * size, dtype=torch.float64, device=device) * (2 * math.pi / (4 * size))
    return (turn.cos() * (2 / number) ** 0.5).to(dtype)[steps]


@dataclass(frozen=True, eq=False)
class DenseGradients:
    """Gradients G [m, o, i]."""

    values: Tensor

    @property
    def operations(self) -> int:
        """Count those of both moments, one half of the first."""
        count, rows, cols = self.values.shape
        return count * moment_operations(rows, cols)

    def __len__(self) -> int:
        """Count the gradients."""
        return len(self.values)

    def part(self, which: slice, *, copy: bool = False) -> "DenseGradients":
        """Return some of the gradients, or a copy of them."""
        return DenseGradients(self.values[which].clone() if copy else self.values[which])

    def add_col_moment_(self, moment: Tensor, row: Tensor, alpha: float) -> None:
        """Add alpha * sum G^T P^2 G, P as a vector where it is diagonal."""
        by_col = row[:, None] * self.values if row.dim() == 1 else row @ self.values
        add_moment_(moment, by_col.flatten(0, 1), alpha)

    def add_row_moment_(self, moment: Tensor, col: Tensor, alpha: float) -> None:
        """Add alpha * sum G M M^T G^T, or of its diagonal where the moment is a vector; M [i, any]."""
        product = self.values @ col
        if moment.dim() == 1:
            moment.add_(torch.linalg.vector_norm(product, dim=2).square_().sum(0), alpha=alpha)
        else:
            add_moment_(moment, product.mT.reshape(-1, len(moment)), alpha)

    def add_layer_moments_(self, row_moment: Tensor, col_moment: Tensor, alpha: float) -> None:
        """Add alpha * sum G G^T and alpha * sum G^T G, which stand for the moments of factors that are not known."""
        add_moment_(row_moment, self.values.mT.reshape(-1, len(row_moment)), alpha)
        add_moment_(col_moment, self.values.flatten(0, 1), alpha)

    def squared_norm(self) -> Tensor:
        """Sum |G|^2 over all gradients."""
        return self.values.square().sum()

    def along(self, v: Tensor) -> Tensor:
        """Return <G, v> of each gradient [m], v [o, i]."""
        return self.values.flatten(1) @ v.flatten()

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        """Return sum of c G [o, i], a coefficient for each gradient."""
        return torch.einsum("s,soi->oi", coefficients, self.values)

    def quadratic(self, row: Tensor, col: Tensor) -> Tensor:
        """Sum <G, P G M> over all gradients, P as a vector where it is diagonal."""
        by_row = row[:, None] * self.values if row.dim() == 1 else row @ self.values
        return (by_row * (self.values @ col)).sum()


@dataclass(frozen=True, eq=False)
class FactoredGradients:
    """Gradients G = D^T X, X [m, T, i] and D [m, T, o]."""

    inputs: Tensor
    output_gradients: Tensor

    @property
    def operations(self) -> int:
        """Count those of both moments."""
        count, positions, cols = self.inputs.shape
        return count * moment_operations(self.output_gradients.shape[2], cols, positions)

    def __len__(self) -> int:
        """Count the gradients."""
        return len(self.inputs)

    def part(self, which: slice, *, copy: bool = False) -> "FactoredGradients":
        """Return some of the gradients, whose tensors nobody writes to: a copy is not needed."""
        return FactoredGradients(self.inputs[which], self.output_gradients[which])

    def add_col_moment_(self, moment: Tensor, row: Tensor, alpha: float) -> None:
        """Add alpha * sum X^T (D P^2 D^T) X."""
        by_row = self.output_gradients * row if row.dim() == 1 else self.output_gradients @ row
        if self.inputs.shape[1] == 1:
            rows = torch.linalg.vector_norm(by_row, dim=2, keepdim=True) * self.inputs
            add_moment_(moment, rows.flatten(0, 1), alpha)
        else:
            weighted = torch.bmm(torch.bmm(by_row, by_row.mT), self.inputs)
            add_symmetric_product_(moment, self.inputs.flatten(0, 1), weighted.flatten(0, 1), alpha)

    def add_row_moment_(self, moment: Tensor, col: Tensor, alpha: float) -> None:
        """Add alpha * sum D^T (X M M^T X^T) D, or of its diagonal where the moment is a vector; M [i, any]."""
        by_col = self.inputs @ col
        if self.inputs.shape[1] == 1:
            rows = torch.linalg.vector_norm(by_col, dim=2, keepdim=True) * self.output_gradients
            add_moment_(moment, rows.flatten(0, 1), alpha)
            return
        weighted = torch.bmm(torch.bmm(by_col, by_col.mT), self.output_gradients)  # [m, T, o]
        if moment.dim() == 1:
            moment.add_((weighted * self.output_gradients).sum((0, 1)), alpha=alpha)
        else:
            add_symmetric_product_(moment, self.output_gradients.flatten(0, 1), weighted.flatten(0, 1), alpha)

    def add_layer_moments_(self, row_moment: Tensor, col_moment: Tensor, alpha: float) -> None:
        """Add alpha * sum over rows d of D of d d^T, and of x x^T over those of X, as K-FAC has its factors."""
        add_moment_(row_moment, self.output_gradients.flatten(0, 1), alpha)
        add_moment_(col_moment, self.inputs.flatten(0, 1), alpha)

    def squared_norm(self) -> Tensor:
        """Sum |G|^2 = <D D^T, X X^T> over all gradients."""
        x, d = self.inputs, self.output_gradients
        if x.shape[1] == 1:
            return (x.square().sum((1, 2)) * d.square().sum((1, 2))).sum()
        return (torch.bmm(d, d.mT) * torch.bmm(x, x.mT)).sum()

    def along(self, v: Tensor) -> Tensor:
        """Return <G, v> = <D, X v^T> of each gradient [m], v [o, i]."""
        return ((self.inputs @ v.mT) * self.output_gradients).sum((1, 2))

    def weighted_sum(self, coefficients: Tensor) -> Tensor:
        """Return sum of c D^T X [o, i], a coefficient for each gradient."""
        d = self.output_gradients * coefficients[:, None, None]
        return d.flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def quadratic(self, row: Tensor, col: Tensor) -> Tensor:
        """Sum <G, P G M> = <D P D^T, X M X^T> over all gradients, P as a vector where it is diagonal."""
        x, d = self.inputs, self.output_gradients
        by_row, by_col = d * row if row.dim() == 1 else d @ row, x @ col
        if x.shape[1] == 1:
            return ((by_row * d).sum((1, 2)) * (by_col * x).sum((1, 2))).sum()
        return (torch.bmm(by_row, d.mT) * torch.bmm(by_col, x.mT)).sum()


Gradients = DenseGradients | FactoredGradients


def gradients_of(
    observation: Observation, name: str, bias: str | None, dtype: torch.dtype, *, form: str = "least work"
) -> Gradients:
    """Return the gradients of a weight [out, ...] as matrices, in factors or not.

    Args:
        observation: of the weight.
        name: of the weight.
        bias: name of the bias that is one more column, if there is one.
        dtype: of the result.
        form: "least work", "factors" wherever there are any, or "dense": multiplied out in any case.
    """
    factors = observation.gradient_factors.get(name)
    if factors is not None and kept_in_factors(factors, bias, form):
        x, d = (part.to(dtype) for part in factors.matrices())
        if bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], dim=2)
        return FactoredGradients(x, d)
    values = observation.gradients[name]
    values = values.reshape(len(values), values.shape[1] if values.dim() > 2 else 1, -1)
    if bias is not None:
        column = observation.gradients.get(bias)
        column = values.new_zeros(len(values), values.shape[1]) if column is None else column
        values = torch.cat([values, column.reshape(*values.shape[:2], 1)], dim=2)
    return DenseGradients(values.to(dtype))


def kept_in_factors(factors: GradientFactors, bias: str | None, form: str) -> bool:
    """Tell whether `gradients_of` returns gradients of a weight in factors, by the same arguments."""
    t, (o, i) = factors.rows, (factors.shape[0], factors.shape[1] + (bias is not None))
    dense_operations = moment_operations(o, i) + 2 * t * o * i  # with the product itself
    less = moment_operations(o, i, t) < dense_operations
    return factors.whole and (form == "factors" or (form == "least work" and less))


class Directions:
    """Random directions for the layers of one estimate: those of one size, which follow each other, have the same."""

    def __init__(self) -> None:
        self._latest: dict[tuple[Any, ...], Tensor] = {}

    def like(self, col: Tensor, seed: int) -> Tensor:
        """Return `random_directions` for a factor [i, i]."""
        key = len(col), seed, col.dtype, col.device
        if key not in self._latest:
            if len(self._latest) > 1:
                del self._latest[next(iter(self._latest))]
            self._latest[key] = random_directions(*key)
        return self._latest[key]


@dataclass
class LearnedFactors:
    """Q = P (x) M of one parameter [o, i], learned from batches of gradients G by alternating closed-form updates.

    The auxiliary loss A(Q) = 1/2 E|Q g|^2 + 1/2 damping |Q|_F^2 - tr Q is quadratic in each factor, and its
    minimum over one, given the other, is in closed form:

        M = tr P (E[G^T P^2 G] + damping |P|_F^2 I)^-1,     P = tr M (E[G M^2 G^T] + damping |M|_F^2 I)^-1.

    With the other factor divided by its trace, the trace of the new one is that of Q; the expectations, whose scale
    then depends on G alone, are means over all batches so far, later ones weighing more as their Q is better: the t-th
    as t. A mean over many batches changes little by one more: where the inversion for M takes more than the rest, it is
    left out until the gradients have become `GROWTH` times as many, or all are there. Nothing is read from a GPU but by
    the first batch after a warm start.

    Attributes:
        damping: gamma.
        row, col: P and M divided by their traces; P as a vector where the row factor is diagonal.
        row_moment, col_moment: weighted means of G M^2 G^T, or of its diagonal, and of G^T P^2 G.
        trace: tr Q.
        seen: gradients so far.
        carried: the prior weight of an earlier estimate, among these.
        inverted: gradients that `col` is of.
        directions: where random directions are kept, for this and other parameters.
        failed: not 0, or NaN, where a moment could not be inverted.
        raised: True where more than the damping was added, as much as the rounding of the moments.
    """

    damping: float
    row: Tensor
    col: Tensor
    row_moment: Tensor
    col_moment: Tensor
    trace: Tensor
    seen: int = 0
    carried: int = 0
    inverted: int = 0
    directions: Directions = field(default_factory=Directions)
    failed: Tensor | int = 0
    raised: Tensor | bool = False

    @classmethod
    def start(cls, damping: float, diagonal_rows: bool, like: Tensor, rows: int, cols: int) -> "LearnedFactors":
        """Begin from Q = I / damping, the inverse of no gradients."""
        row = like.new_ones(rows) if diagonal_rows else torch.eye(rows, dtype=like.dtype, device=like.device)
        col = torch.eye(cols, dtype=like.dtype, device=like.device)
        moments = zero_moment(like, rows, diagonal_rows), zero_moment(like, cols)
        return cls(damping, row / max(1, rows), col / max(1, cols), *moments, like.new_tensor(rows * cols / damping))

    def warm_start(self, previous: "LearnedFactors", prior_weight: int) -> None:
        """Begin from what an earlier estimate has learned, as if from `prior_weight` gradients at most.

        A network that has changed has gradients of another size: the first batch says by how much.
        """
        for part in LEARNED_TENSORS:
            getattr(self, part).copy_(getattr(previous, part))
        self.seen = self.carried = self.inverted = min(prior_weight, previous.seen)

    @ieee_products()
    def learn(self, grads: Sequence[Gradients], *, monitored: bool = False) -> Tensor | None:
        """Update both factors by a batch; the first after a warm start says how large gradients are now.

        Args:
            grads: all gradients of the batch.
            monitored: whether the loss is asked for, which takes i^3 operations.

        Returns:
            the auxiliary loss on this batch before the update, but after the size of gradients was matched.
        """
        count = sum(map(len, grads))
        rescale = 0 < self.carried == self.seen
        self.seen += count
        weight = 2 * count / (self.seen + count)  # of the t-th batch in the mean: t
        moment = torch.zeros_like(self.col_moment)
        for part in grads:
            part.add_col_moment_(moment, self.row, 1 / count)
        loss = self._loss(moment, rescale) if monitored or rescale else None
        _update_mean_(self.col_moment, moment, weight, rescale)
        cheap = INVERSION * len(self.col) ** 3 <= sum(part.operations for part in grads)
        if due := rescale or cheap or self.seen - self.carried >= GROWTH * (self.inverted - self.carried):
            self._invert_col()
        moment = torch.zeros_like(self.row_moment)
        col = self._along_directions() if moment.dim() == 1 else self.col
        for part in grads:
            part.add_row_moment_(moment, col, 1 / count)
        _update_mean_(self.row_moment, moment, weight, rescale)
        best = self._inverse(self.row_moment, self.col.square().sum())
        trace = diagonal_of(best).sum()
        self.row = best / trace
        if due:  # else M knows nothing of this batch, whose moment is then no measure of Q
            self.trace = trace
        return loss

    def factors(self) -> Factors:
        """Return P and M as of all gradients so far."""
        if self.inverted < self.seen:
            self._invert_col()
        self.failed = self.failed + 0 * (self.row.sum() + self.col.sum())  # NaN where they are not finite
        return Factors(self.row * self.trace, self.col)

    def _along_directions(self) -> Tensor:
        """Return M times random directions, along which g M is in the mean as long as it is; M where it is small."""
        size = len(self.col)
        if num_directions(size) == size:
            return self.col
        return self.col @ self.directions.like(self.col, self.seen)

    def _invert_col(self) -> None:
        best = self._inverse(self.col_moment, self.row.square().sum())
        self.trace = best.trace()
        self.col = best / self.trace
        self.inverted = self.seen

    def _inverse(self, moment: Tensor, squared: Tensor) -> Tensor:
        """Return (moment + damping * squared * I)^-1, computed in float64; or of a diagonal moment, a vector."""
        damping = self.damping * squared
        if moment.dim() == 1:
            return (moment + damping).reciprocal()
        inverse, failed, self.raised = damped_inverse(moment, damping)
        self.failed = self.failed + failed
        return inverse

    def _loss(self, moment: Tensor, rescale: bool) -> Tensor:
        """Return the auxiliary loss where the mean of G^T P^2 G is `moment`: E|Q g|^2 = tr(M moment M).

        With rescale, Q takes the scale at which the loss is least first.
        """
        squared = (self.col @ moment * self.col).sum()
        squared += self.damping * self.row.square().sum() * self.col.square().sum()
        if rescale:  # 1/2 c^2 squared - c is least for c = 1 / squared
            self.trace = 1 / squared
        return 0.5 * self.trace**2 * squared - self.trace


def damped_inverse(moment: Tensor, damping: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (moment + damping I)^-1, computed in float64 without waiting for a GPU.

    Returns:
        the inverse; not 0 where there is none; and True where more than the damping was added, as much as the rounding
        of the moment.
    """
    wide = moment.to(torch.float64, copy=True)
    # Rounding of the moment may have made it indefinite: by its spectral norm, of a random matrix of roundings.
    rounding = 2 * torch.finfo(moment.dtype).eps * len(moment) ** 0.5 * wide.diagonal().mean()
    wide.diagonal().add_(torch.maximum(damping, rounding))
    if wide.device.type == "cpu":
        inverse, failed = (found[0] for found in ops.block_inverse(wide[None], 0.0))
    else:  # where block_inverse looks whether damping must be raised
        factor, failed = torch.linalg.cholesky_ex(wide)
        inverse = torch.cholesky_inverse(factor)
        inverse = ((inverse + inverse.mT) / 2).contiguous()
    return inverse.to(moment.dtype), failed, rounding > damping


def _update_mean_(mean: Tensor, moment: Tensor, weight: float, rescale: bool) -> None:
    """Update a running mean in place; with `rescale`, first match its trace to the new moment's."""
    if rescale and (before := diagonal_of(mean).sum()) > 0:
        mean *= diagonal_of(moment).sum() / before
    mean.lerp_(moment, weight)
