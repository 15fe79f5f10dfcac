"""Running Kronecker factors of one parameter's Fisher matrix, and their damped inverses."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.dtypes import ieee_products
from fishleg_ext.curvature.base import curvature_entry
from fishleg_ext.curvature.fishleg_adam import Adam, AdamFactors
from fishleg_ext.curvature.kronecker import Factors, zero_moment
from fishleg_ext.curvature.learned_factors import Gradients, damped_inverse

TENSORS = ("row_moment", "col_moment", "row", "col")


def check_shapes(name: str, own: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Raise ValueError where the tensors of a state are missing or of other shapes."""
    for part, tensor in own.items():
        theirs = curvature_entry(state, part)
        if tensor.shape != theirs.shape:
            raise ValueError(f"expected {part} of {name} of shape {list(tensor.shape)}, got {list(theirs.shape)}")


class RunningFactors:
    """F = R (x) C of one parameter [o, i], from gradients G of labels that the model itself draws.

    Each batch of gradients adds a term to two running means. With the inverses P and M of the time they are those of
    FishLeg's alternating closed-form updates (see `LearnedFactors`), whose auxiliary loss is least for

        R ~ E[G M^2 G^T],     C ~ E[G^T P^2 G];

    K-FAC has P = M = I and G = d x^T in the factors alone, R ~ E[d d^T] and C ~ E[x x^T] (Martens and Grosse, arXiv
    1503.05671). Both are scaled so that the mean of either diagonal is the root of f, the mean diagonal of F, and are
    damped in their factors, as K-FAC has it:

        P = (R + sqrt(damping) I)^-1,     M = (C + sqrt(damping) I)^-1.

    P (x) M tends to I / damping where gradients vanish. Damping F itself instead, by the same number, leaves directions
    of small curvature among rows *or* among columns nearly undamped: as a step this overshot.

    Args:
        rows, cols: o and i, a bias among the columns.
        like: a tensor of the dtype and on the device of the factors.
        learned: whether by FishLeg's updates; else by K-FAC's.
    """

    def __init__(self, rows: int, cols: int, like: Tensor, *, learned: bool) -> None:
        self.learned, self.batches = learned, 0
        self.form = "least work" if learned else "factors"  # of gradients, which for K-FAC are its own
        self.row_moment, self.col_moment = zero_moment(like, rows), zero_moment(like, cols)
        self.row, self.col = torch.eye(rows).to(like), torch.eye(cols).to(like)

    @ieee_products()
    def observe(self, grads: Sequence[Gradients], memory: float) -> None:
        """Take in a batch of gradients.

        Args:
            grads: all gradients of the batch.
            memory: what share of the running means each later batch leaves of an earlier one.
        """
        count = sum(map(len, grads))
        row_moment, col_moment = torch.zeros_like(self.row_moment), torch.zeros_like(self.col_moment)
        for part in grads:
            if self.learned:
                part.add_row_moment_(row_moment, self.col, 1 / count)
                part.add_col_moment_(col_moment, self.row, 1 / count)
            else:
                part.add_layer_moments_(row_moment, col_moment, 1 / count)
        self.batches += 1
        squared = torch.stack([part.squared_norm() for part in grads]).sum() / count
        root = (squared / (len(row_moment) * len(col_moment))).sqrt()
        weight = max(1 / self.batches, 1 - memory)
        means = []
        for mean, moment in ((self.row_moment, row_moment), (self.col_moment, col_moment)):
            diagonal = moment.diagonal().mean()
            means.append(mean.lerp(moment * torch.where(diagonal > 0, root / diagonal, 0), weight))
        self.row_moment, self.col_moment = means

    def invert(self, damping: float) -> Tensor:
        """Compute P and M anew, and return what is not 0 where there is none: nothing is read from a GPU."""
        self.row, row_failed, _ = damped_inverse(self.row_moment, self._root(damping))
        self.col, col_failed, _ = damped_inverse(self.col_moment, self._root(damping))
        return row_failed.abs() + col_failed.abs()

    def mean_square(self) -> Tensor:
        """Return the mean diagonal of F, which is 0 until a gradient was not."""
        return self.row_moment.diagonal().mean() * self.col_moment.diagonal().mean()

    def _root(self, damping: float) -> Tensor:
        return torch.full((), damping**0.5, dtype=torch.float64, device=self.row.device)

    def diagonal_rows(self, columns: Tensor, damping: float) -> tuple[Factors, Tensor]:
        """Return a diagonal P, and M of these columns, by another damping: the inverse of each row by itself.

        Beside them is what is not 0 where there is none.
        """
        col, failed, _ = damped_inverse(self.col_moment[columns][:, columns], self._root(damping))
        return Factors(1 / (self.row_moment.diagonal() + damping**0.5), col), failed

    def check_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a state is of another kind, or of other shapes."""
        check_shapes(name, {part: getattr(self, part) for part in TENSORS}, state)

    def state_dict(self) -> dict[str, Any]:
        """Return moments, inverses and how many batches went into them."""
        return {"batches": self.batches, **{part: getattr(self, part) for part in TENSORS}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        for part in TENSORS:
            setattr(self, part, curvature_entry(state, part).to(self.row_moment).clone())
        self.batches = int(curvature_entry(state, "batches"))


class DescendedFactors:
    """F^-1 = P (x) M of one parameter [o, i] by the papers' way: Adam on the auxiliary loss of (F + damping I)^-1.

    Garcia et al., FishLeg, ICLR 2023. It starts from the multiple of I at which the loss is least on the first batch.

    Args:
        rows, cols: o and i, a bias among the columns.
        like: a tensor of the dtype and on the device of the factors.
        options: of Adam, without a scale and for steps without end.
        damping: of F.
        seed: of probes.
    """

    form = "least work"  # of gradients

    def __init__(self, rows: int, cols: int, like: Tensor, options: Adam, damping: float, seed: int) -> None:
        self._options, self._damping, self._seed = options, damping, seed
        self.row, self.col = torch.eye(rows).to(like), torch.eye(cols).to(like)
        self._descended: AdamFactors | None = None
        self._squared = torch.zeros_like(self.row[0, 0])

    def observe(self, grads: Sequence[Gradients], memory: float) -> None:
        """Take a step of Adam for each part of a batch of gradients, which is one where they stay in factors.

        `memory` is Adam's own.
        """
        for part in grads:
            squared = part.squared_norm() / (len(part) * len(self.row) * len(self.col))
            self._squared = self._squared + squared
            if self._descended is None:
                root = (squared + self._damping) ** -0.25
                self._descended = self._begin(Factors(self.row * root, self.col * root))
            self._descended.learn(part)

    def mean_square(self) -> Tensor:
        """Return what is 0 until a gradient was not."""
        return self._squared

    def invert(self, damping: float) -> Tensor:
        """Take over P and M as they have become, and return what is not 0 where they are not finite."""
        if self._descended is not None:
            self.row, self.col, _ = self._descended.factors()
        return 1 - (self.row.isfinite().all() & self.col.isfinite().all()).int()

    def diagonal_rows(self, columns: Tensor, damping: float) -> tuple[Factors, Tensor]:
        """Return the inverse of each row by itself; its damping is that of what was learned."""
        row, failed, _ = damped_inverse(self.row, torch.zeros((), dtype=torch.float64, device=self.row.device))
        return Factors(1 / row.diagonal(), self.col[columns][:, columns]), failed

    def check_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError where a state is of another kind, or of other shapes."""
        check_shapes(name, {"row": self.row, "col": self.col, "squared": self._squared}, state)
        curvature_entry(state, "descended")

    def state_dict(self) -> dict[str, Any]:
        """Return the factors in use, and the roots with the state of Adam."""
        descended = None if self._descended is None else self._descended.state_dict()
        return {"row": self.row, "col": self.col, "squared": self._squared, "descended": descended}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        self.row, self.col, self._squared = (
            curvature_entry(state, part).to(self.row).clone() for part in ("row", "col", "squared")
        )
        descended = curvature_entry(state, "descended")
        self._descended = None if descended is None else self._begin(Factors(self.row, self.col))
        if self._descended is not None:
            self._descended.load_state_dict(descended)

    def _begin(self, start: Factors) -> AdamFactors:
        return AdamFactors(self._options, self._damping, start, self._seed)
