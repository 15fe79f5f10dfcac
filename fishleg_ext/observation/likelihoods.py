"""Targets sampled from a model's own likelihood, with which mean g g^T estimates the true Fisher matrix."""

from collections.abc import Callable
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFunction = Callable[[Any, Any], Tensor]
Likelihood = str | Callable[[Any, torch.Generator], Any]
LossHessian = Callable[[Tensor, Tensor], Tensor]


def checked_likelihood(name: str, value: Any) -> Likelihood:
    """Return `value` if it is the name of a likelihood or a function."""
    if not (callable(value) or (isinstance(value, str) and value in SAMPLERS)):
        raise ValueError(f"expected {name} to be one of {', '.join(SAMPLERS)} or a function, got {value!r}")
    return value


class LabelSampler:
    """Draws targets from a model's outputs.

    Args:
        draw: (outputs, generator) -> targets.
        count_terms: (targets, samples) -> how many independent terms the loss is the mean of.
    """

    def __init__(self, draw: Callable[[Any, torch.Generator], Any], count_terms: Callable[[Any, int], int]) -> None:
        self._draw, self._count_terms = draw, count_terms

    def draw(
        self, generator: torch.Generator, outputs: Any, samples: int, count: int
    ) -> tuple[Any, Union[float, Tensor]]:
        """Targets, and what makes the mean square of `count` gradients, of equal shares of the samples, the Fisher's.

        Returns:
            targets for all samples, and a factor for all gradients or [count] of them.
        """
        if self._draw in SAMPLERS.values() and not isinstance(outputs, Tensor):
            raise TypeError(
                f"expected a tensor of outputs, got a {type(outputs).__name__}; "
                "give likelihood= as a function (outputs, generator) -> targets"
            )
        if self._draw is _categorical and samples == count and outputs.dim() == 2:
            return _informative_classes(outputs, generator)
        targets = self._draw(outputs, generator)
        for leaf in pytree.tree_leaves(targets):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                raise TypeError(f"expected likelihood to draw a tensor with a target for each sample, got {leaf!r}")
            if len(leaf) != samples:
                raise ValueError(f"expected likelihood to draw targets for {samples} samples, got {len(leaf)}")
        # The mean of t independent terms has a gradient whose square is Fisher / t.
        return targets, (self._count_terms(targets, samples) / count) ** 0.5


def label_sampler(labels: str, loss_fn: LossFunction, likelihood: Optional[Likelihood]) -> Optional[LabelSampler]:
    """How to draw targets, or None to take those of the data.

    A named likelihood goes with a loss that is the mean over all targets, as PyTorch's are by default (over outputs and
    positions too); a function goes with one that is the mean over samples.

    Raises:
        ValueError: labels is neither "data" nor "model", or the likelihood is unknown or cannot be told.
    """
    if labels not in ("data", "model"):
        raise ValueError(f"expected labels to be 'data' or 'model', got {labels!r}")
    if not (likelihood is None or callable(likelihood) or likelihood in SAMPLERS):
        raise ValueError(f"expected likelihood to be one of {', '.join(SAMPLERS)} or a function, got {likelihood!r}")
    if labels == "data":
        return None
    if callable(likelihood):
        return LabelSampler(likelihood, lambda targets, samples: samples)
    return LabelSampler(SAMPLERS[_named(loss_fn, likelihood)], lambda targets, samples: targets.numel())


def loss_hessian(loss_fn: LossFunction, likelihood: Optional[Likelihood]) -> LossHessian:
    """(outputs, v) -> H v, H the second derivative by the outputs of the mean negative log-likelihood.

    Raises:
        ValueError: the likelihood is a function or unknown, or cannot be told.
    """
    if callable(likelihood) or not (likelihood is None or likelihood in HESSIANS):
        raise ValueError(
            f"expected likelihood to be one of {', '.join(HESSIANS)} for products with the Fisher matrix, "
            f"got {likelihood!r}"
        )
    hessian = HESSIANS[_named(loss_fn, likelihood)]

    def of_tensors(outputs: Tensor, v: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise TypeError(f"expected a tensor of outputs, got a {type(outputs).__name__}")
        return hessian(outputs, v)

    return of_tensors


def _named(loss_fn: LossFunction, likelihood: Optional[str]) -> str:
    """The likelihood given, or that of the loss."""
    if likelihood is not None:
        return likelihood
    if loss_fn is not nn.functional.cross_entropy and not isinstance(loss_fn, nn.CrossEntropyLoss):
        raise ValueError(
            "expected likelihood= for the true Fisher matrix (labels='model') of another loss than cross_entropy: "
            "'categorical', 'gaussian', 'bernoulli' or a function (outputs, generator) -> targets"
        )
    return "categorical"


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Classes from logits [N, C, ...]."""
    probabilities = _finite(logits).float().softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(probabilities.shape[:-1])


def _informative_classes(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Classes from logits [N, C] by importance: as often as they matter for the Fisher matrix, and a factor for each.

    The Fisher matrix of a sample is sum_c p_c g_c g_c^T, and g_c, the gradient for class c, goes through e_c - p at the
    logits. A network that is sure of its answers hardly ever draws another class c from p, yet these make up nearly all
    of the sum: few gradients in a thousand would carry the estimate. Classes are drawn from
    q_c ~ p_c |e_c - p|^2 instead, and sqrt(p_c / q_c) g_c has the same mean square as g_c drawn from p, and at the
    logits the same norm whatever class is drawn: the proposal of the least variance there.
    """
    p = _finite(logits).double().softmax(1)
    others = p.sum(1, keepdim=True) - p  # 1 - p_c
    norm = p.square().sum(1, keepdim=True) - p.square() + others.square()  # |e_c - p|^2
    weight = p * norm
    total = weight.sum(1, keepdim=True)
    q = torch.where(total > 0, weight / total, p)
    classes = torch.multinomial(q, 1, generator=generator)
    return classes[:, 0], (p / q).gather(1, classes)[:, 0].sqrt().to(logits.dtype)


def _gaussian(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Values of variance 1/2, as the loss (y - mean)^2 is a negative log-likelihood of."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return _finite(mean) + noise * 0.5**0.5


def _bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Zeros and ones from logits."""
    return torch.bernoulli(_finite(logits).sigmoid(), generator=generator)


def _finite(outputs: Tensor) -> Tensor:
    if not outputs.isfinite().all():
        raise ValueError("the model's outputs, which labels are to be sampled from, contain NaN or inf")
    return outputs


def _categorical_hessian(logits: Tensor, v: Tensor) -> Tensor:
    """diag(p) - p p^T, for classes in dimension 1."""
    p = logits.softmax(1)
    return p * (v - (p * v).sum(1, keepdim=True)) * (logits.shape[1] / logits.numel())


def _gaussian_hessian(mean: Tensor, v: Tensor) -> Tensor:
    return 2 * v / mean.numel()


def _bernoulli_hessian(logits: Tensor, v: Tensor) -> Tensor:
    p = logits.sigmoid()
    return p * (1 - p) * v / logits.numel()


HESSIANS: dict[str, LossHessian] = {
    "categorical": _categorical_hessian,
    "gaussian": _gaussian_hessian,
    "bernoulli": _bernoulli_hessian,
}
SAMPLERS = {"categorical": _categorical, "gaussian": _gaussian, "bernoulli": _bernoulli}
