"""How FishLeg learns the two factors of one parameter's inverse."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import ieee_products
from fishleg_ext.curvature.kronecker import Factors, add_moment_, diagonal_of, zero_moment

LEARNED_TENSORS = ("row", "col", "row_moment", "col_moment", "trace")


@dataclass
class LearnedFactors:
    """Q = P (x) M of one parameter [o, i], learned from batches of gradients G by alternating closed-form updates.

    The auxiliary loss A(Q) = 1/2 E|Q g|^2 + 1/2 damping |Q|_F^2 - tr Q is quadratic in each factor, and its
    minimum over one, given the other, is in closed form:

        M = tr P (E[G^T P^2 G] + damping |P|_F^2 I)^-1,     P = tr M (E[G M^2 G^T] + damping |M|_F^2 I)^-1.

    With the other factor divided by its trace, the trace of the new one is that of Q; the expectations, whose scale
    then depends on G alone, are means over all batches so far, later ones weighing more as their Q is better: the t-th
    as t.

    Attributes:
        damping: gamma.
        row, col: P and M divided by their traces; P as a vector where the row factor is diagonal.
        row_moment, col_moment: weighted means of G M^2 G^T, or of its diagonal, and of G^T P^2 G.
        trace: tr Q.
        seen: gradients so far.
        carried: the prior weight of an earlier estimate, among these.
    """

    damping: float
    row: Tensor
    col: Tensor
    row_moment: Tensor
    col_moment: Tensor
    trace: Tensor
    seen: int = 0
    carried: int = 0

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
        self.seen = self.carried = min(prior_weight, previous.seen)

    @ieee_products()
    def learn(self, grads: Tensor, invert: Callable[[Tensor, float], Tensor]) -> Tensor:
        """Update both factors by a batch; the first after a warm start says how large gradients are now.

        Args:
            grads: [m, o, i].
            invert: (matrix or diagonal as a vector, damping) -> (matrix + damping I)^-1.

        Returns:
            the auxiliary loss on this batch before the update, but after the size of gradients was matched.
        """
        rescale = 0 < self.carried == self.seen
        self.seen += len(grads)
        weight = 2 * len(grads) / (self.seen + len(grads))  # of the t-th batch in the mean: t
        by_col = self.row[:, None] * grads if self.row.dim() == 1 else self.row @ grads
        moment = torch.zeros_like(self.col_moment)
        add_moment_(moment, by_col.flatten(0, 1), 1 / len(grads))
        loss = self._loss(moment, rescale)
        _update_mean_(self.col_moment, moment, weight, rescale)
        best = invert(self.col_moment, self.damping * float(self.row.square().sum()))
        self.col = best / best.trace()
        moment = torch.zeros_like(self.row_moment)
        add_moment_(moment, (grads @ self.col).mT.reshape(-1, len(moment)), 1 / len(grads))
        _update_mean_(self.row_moment, moment, weight, rescale)
        best = invert(self.row_moment, self.damping * float(self.col.square().sum()))
        self.trace = diagonal_of(best).sum()
        self.row = best / self.trace
        return loss

    def factors(self) -> Factors:
        """Return P and M."""
        return Factors(self.row * self.trace, self.col)

    def _loss(self, moment: Tensor, rescale: bool) -> Tensor:
        """Return the auxiliary loss where the mean of G^T P^2 G is `moment`: E|Q g|^2 = tr(M moment M).

        With rescale, Q takes the scale at which the loss is least first.
        """
        squared = (self.col @ moment * self.col).sum()
        squared += self.damping * self.row.square().sum() * self.col.square().sum()
        if rescale:  # 1/2 c^2 squared - c is least for c = 1 / squared
            self.trace = 1 / squared
        return 0.5 * self.trace**2 * squared - self.trace


def _update_mean_(mean: Tensor, moment: Tensor, weight: float, rescale: bool) -> None:
    """Update a running mean in place; with `rescale`, first match its trace to the new moment's."""
    if rescale and (before := diagonal_of(mean).sum()) > 0:
        mean *= diagonal_of(moment).sum() / before
    mean.lerp_(moment, weight)
