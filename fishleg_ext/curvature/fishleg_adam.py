"""Adam on the roots of Q, as in the papers of FishLeg: for comparison with alternating closed-form updates."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.arguments import checked_count
from fishleg_ext.common.dtypes import ieee_products
from fishleg_ext.curvature.kronecker import Factors, diagonal_of
from fishleg_ext.curvature.learned_factors import DenseGradients, Gradients
from fishleg_ext.reference.kron import kron_diag, kron_mul

LOSSES = ("auxiliary", "log_determinant")
PROBES = ("gaussian", "gradients")
PRODUCTS = ("gradients", "gauss_newton")


@dataclass(frozen=True)
class Adam:
    """Settings of Adam on lambda = (scale, R, L), by which FishLeg descends in place of closed-form updates.

    Q = diag(scale) (R^T R (x) L L^T) diag(scale), positive semidefinite whatever the roots are. Without probes a batch
    of gradients g gives the exact expectation of the loss over u. With probes a step is that of the papers: v = Q u,
    the residual r = F v + damping v - u, s = Q r (or r itself), both as constants, and a step down the gradient of
    <s, Q u> / |v| |u|. Garcia et al., FishLeg, ICLR 2023; McGowan et al., FishLeg Surgeon, arXiv 2412.02328.

    Attributes:
        learning_rate: relative to the root mean square of each of scale, R and L at the start; falls linearly to 0.
        steps: after which nothing changes any more; a batch is a step, with Gauss-Newton products each chunk that the
            gradients of are computed at a time. None goes on for ever, at a constant rate.
        warm_up: gradients that alternating closed-form updates learn from first.
        loss: "auxiliary", or "log_determinant": 1/2 tr(Q (F + damping I)) - 1/2 log det Q, which has the same minimum
            where Q can be the inverse; without probes alone.
        probes: None, "gaussian" (u ~ N(0, I)) or "gradients" (u from the batch).
        num_probes: in a step.
        preconditioned: s = Q r; else s = r, whose steps are larger where Q is small.
        products: F v of the probes by "gradients", mean g (g^T v) over the batch, each parameter by itself; or by
            "gauss_newton", exact products with the Fisher matrix of all parameters that are estimated together, on the
            inputs of a chunk, for which the likelihood must be a named one.
        scaled: whether Q has a scale of its own for each weight; else it is P (x) M alone.

    Raises:
        ValueError: a value is unknown, or two do not go together.
    """

    learning_rate: float = 0.02
    steps: int | None = 100
    warm_up: int = 512
    loss: str = "auxiliary"
    probes: str | None = None
    num_probes: int = 1
    preconditioned: bool = True
    products: str = "gradients"
    scaled: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (("loss", LOSSES), ("products", PRODUCTS), ("probes", (None, *PROBES))):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"expected {name} to be one of {', '.join(map(str, allowed))}, got {self.__dict__[name]!r}"
                )
        for name in ("steps", "warm_up", "num_probes"):
            if getattr(self, name) is not None or name != "steps":
                checked_count(name, getattr(self, name))
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"expected learning_rate > 0, got {self.learning_rate}")
        if self.probes is not None and self.loss != "auxiliary":
            raise ValueError(f"expected loss='auxiliary' with probes, got {self.loss!r}")
        if self.products == "gauss_newton" and self.probes != "gaussian":
            raise ValueError(f"expected probes='gaussian' with Gauss-Newton products, got {self.probes!r}")


class AdamFactors:
    """Q of one parameter [o, i], descended.

    Args:
        options: how.
        damping: gamma.
        start: Q at first, positive definite.
        seed: of the probes.
    """

    def __init__(self, options: Adam, damping: float, start: Factors, seed: int) -> None:
        self.options, self.damping, self.taken = options, damping, 0
        row, col, _ = start
        self.row = row.sqrt() if row.dim() == 1 else _root(row).mT.contiguous()
        self.col = _root(col)
        self.scale = row.new_ones(len(row), len(col)) if options.scaled else None
        self._generator = torch.Generator(row.device).manual_seed(seed)
        self._optimizer = torch.optim.Adam(
            [{"params": [x], "lr": float(options.learning_rate * x.square().mean().sqrt())} for x in self._roots()]
        )
        self._rates = [group["lr"] for group in self._optimizer.param_groups]

    @ieee_products()
    def factors(self) -> Factors:
        """P = R^T R, M = L L^T and the scale."""
        row = self.row.square() if self.row.dim() == 1 else self.row.mT @ self.row
        return Factors(row, self.col @ self.col.mT, self.scale)

    @ieee_products()
    def learn(self, grads: Gradients) -> Tensor:
        """A step by a batch of gradients, but for Gauss-Newton products; returns the loss on them before."""
        if self.options.probes is None:
            with torch.enable_grad():
                loss = self._loss(self._tracked(), grads)
                self._step(loss)
            return loss.detach()
        loss = self._loss(self.factors(), grads)
        if self.options.products == "gradients":
            u, v = self.probe(grads)
            self.follow(u, v, torch.stack([grads.weighted_sum(grads.along(each) / len(grads)) for each in v]))
        return loss

    @ieee_products()
    def probe(self, grads: Gradients | None = None) -> tuple[Tensor, Tensor]:
        """Probes u, of these gradients if they are not to be Gaussian, and v = Q u, both [num_probes, o, i]."""
        count = self.options.num_probes
        if self.options.probes == "gradients" and grads is not None:
            chosen = torch.eye(len(grads), dtype=self.col.dtype, device=self.col.device)[:count]
            u = torch.stack([grads.weighted_sum(one) for one in chosen])
        else:
            shape = count, self.row.shape[-1], len(self.col)
            u = torch.randn(shape, generator=self._generator, dtype=self.col.dtype, device=self.col.device)
        with torch.no_grad():
            return u, kron_mul(u, *self.factors())

    @ieee_products()
    def follow(self, u: Tensor, v: Tensor, fisher_v: Tensor) -> None:
        """A step by probes u, v = Q u and F v, [n, o, i] each."""
        with torch.no_grad():
            residual = fisher_v + self.damping * v - u
            s = kron_mul(residual, *self.factors()) if self.options.preconditioned else residual
            norms = u.flatten(1).norm(dim=1) * v.flatten(1).norm(dim=1)
            s = s / torch.where(norms > 0, norms, 1)[:, None, None]
        with torch.enable_grad():
            self._step((s * kron_mul(u, *self._tracked())).sum() / len(u))

    def state_dict(self) -> dict[str, Any]:
        """Roots, Adam's moments, steps and the generator of probes."""
        return {
            "roots": [x.detach() for x in self._roots()],
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates,
            "taken": self.taken,
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        for own, theirs in zip(self._roots(), state["roots"], strict=True):
            own.copy_(theirs)
        self._optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
        self._rates, self.taken = list(state["rates"]), int(state["taken"])
        self._generator.set_state(state["generator"].cpu())

    def _roots(self) -> list[Tensor]:
        return [self.row, self.col, *([] if self.scale is None else [self.scale])]

    def _tracked(self) -> Factors:
        """The factors, for autograd."""
        for root in self._roots():
            root.requires_grad_()
        return self.factors()

    def _loss(self, factors: Factors, grads: Gradients) -> Tensor:
        """The exact expectation over u, on this batch."""
        (row, col, _), scale = factors, self.scale
        if scale is not None:  # F of scaled weights has scaled gradients
            assert isinstance(grads, DenseGradients)
            grads = DenseGradients(grads.values * scale)
        if self.options.loss == "log_determinant":
            trace = kron_diag(*factors).sum()
            expected = grads.quadratic(row, col) / len(grads) + self.damping * trace
            row_log = row.log().sum() if row.dim() == 1 else torch.linalg.slogdet(row).logabsdet
            log_det = len(col) * row_log + row.shape[0] * torch.linalg.slogdet(col).logabsdet
            scale_log = 0 if scale is None else scale.abs().log().sum()
            return 0.5 * (expected - log_det) - scale_log
        if scale is None:
            squared = grads.quadratic(row.square() if row.dim() == 1 else row @ row, col @ col)
            norm, trace = row.square().sum() * col.square().sum(), diagonal_of(row).sum() * col.trace()
        else:
            assert isinstance(grads, DenseGradients)
            squared = (scale * kron_mul(grads.values, row, col)).square().sum()
            squares = scale.square()
            by_row = row.square()[:, None] * squares if row.dim() == 1 else row.square() @ squares
            norm, trace = (squares * (by_row @ col.square())).sum(), kron_diag(*factors).sum()
        return 0.5 * (squared / len(grads) + self.damping * norm) - trace

    def _step(self, loss: Tensor) -> None:
        last = self.options.steps
        if last is None or self.taken < last:
            self._optimizer.zero_grad()
            loss.backward()
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = rate if last is None else rate * (1 - self.taken / last)
            self._optimizer.step()
            self.taken += 1
        for root in self._roots():
            root.requires_grad_(False)


def _root(matrix: Tensor) -> Tensor:
    """L with L L^T = matrix, also where rounding has made it indefinite, and then regular."""
    values, vectors = torch.linalg.eigh(matrix.double())
    least = torch.finfo(matrix.dtype).eps * values.max()
    return (vectors * values.clamp(min=least).sqrt()).to(matrix.dtype)
