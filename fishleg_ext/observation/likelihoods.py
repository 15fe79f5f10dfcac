"""Targets sampled from a model's own likelihood, with which mean g g^T estimates the true Fisher matrix."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

LossFunction = Callable[[Any, Any], Tensor]
Likelihood = str | Callable[[Any, torch.Generator], Any]
LossHessian = Callable[[Tensor, Tensor], Tensor]


def checked_likelihood(name: str, value: Any) -> Likelihood:
    """Return `value` if it is the name of a likelihood or a function."""
    if not (callable(value) or (isinstance(value, str) and value in LIKELIHOODS)):
        raise ValueError(f"expected {name} to be one of {', '.join(LIKELIHOODS)} or a function, got {value!r}")
    return value


@dataclass(frozen=True)
class NamedLikelihood:
    """A likelihood that losses of PyTorch are the negative logarithm of, as means over all targets.

    Attributes:
        sample: (outputs, generator) -> targets.
        hessian: (outputs, v) -> H v, H the second derivative of the mean loss by the outputs.
        sample_by_importance: (outputs [N, C], generator) -> a target for each sample, and a factor [N] for its
            gradient; None where targets are drawn as they are distributed.
    """

    sample: Callable[[Tensor, torch.Generator], Tensor]
    hessian: LossHessian
    sample_by_importance: Callable[[Tensor, torch.Generator], tuple[Tensor, Tensor]] | None = None


class LabelSampler:
    """Draws targets from a model's outputs.

    Args:
        likelihood: a named one; or (outputs, generator) -> targets, for a loss that is the mean over samples.
    """

    def __init__(self, likelihood: NamedLikelihood | Callable[[Any, torch.Generator], Any]) -> None:
        self.likelihood = likelihood

    def draw(self, generator: torch.Generator, outputs: Any, samples: int, count: int) -> tuple[Any, float | Tensor]:
        """Draw targets, and a factor that makes the mean square of `count` gradients that of the Fisher matrix.

        Returns:
            targets for all samples, and a factor for all gradients or [count] of them.
        """
        if isinstance(self.likelihood, NamedLikelihood):
            if not isinstance(outputs, Tensor):
                raise TypeError(
                    f"expected a tensor of outputs, got a {type(outputs).__name__}; "
                    "give likelihood= as a function (outputs, generator) -> targets"
                )
            if self.likelihood.sample_by_importance is not None and samples == count and outputs.dim() == 2:
                return self.likelihood.sample_by_importance(outputs, generator)
            targets = self.likelihood.sample(outputs, generator)
            terms = targets.numel()
        else:
            targets = self.likelihood(outputs, generator)
            terms = samples
        for leaf in pytree.tree_leaves(targets):
            if not isinstance(leaf, Tensor) or leaf.dim() == 0:
                raise TypeError(f"expected likelihood to draw a tensor with a target for each sample, got {leaf!r}")
            if len(leaf) != samples:
                raise ValueError(f"expected likelihood to draw targets for {samples} samples, got {len(leaf)}")
        # The mean of t independent terms has a gradient whose square is Fisher / t.
        return targets, (terms / count) ** 0.5


def label_sampler(labels: str, loss_fn: LossFunction, likelihood: Likelihood | None) -> LabelSampler | None:
    """Choose how targets are drawn, or return None to take those of the data.

    A named likelihood goes with a loss that is the mean over all targets, as PyTorch's are by default (over outputs and
    positions too); a function goes with one that is the mean over samples.

    Raises:
        ValueError: labels is neither "data" nor "model", or the likelihood is unknown or cannot be told.
    """
    if labels not in ("data", "model"):
        raise ValueError(f"expected labels to be 'data' or 'model', got {labels!r}")
    if likelihood is not None:
        checked_likelihood("likelihood", likelihood)
    if labels == "data":
        return None
    return LabelSampler(likelihood if callable(likelihood) else LIKELIHOODS[_named(loss_fn, likelihood)])


def loss_hessian(loss_fn: LossFunction, likelihood: Likelihood | None) -> LossHessian:
    """Return (outputs, v) -> H v, H the second derivative by the outputs of the mean negative log-likelihood.

    Raises:
        ValueError: the likelihood is a function or unknown, or cannot be told.
    """
    if callable(likelihood) or not (likelihood is None or likelihood in LIKELIHOODS):
        raise ValueError(
            f"expected likelihood to be one of {', '.join(LIKELIHOODS)} for products with the Fisher matrix, "
            f"got {likelihood!r}"
        )
    hessian = LIKELIHOODS[_named(loss_fn, likelihood)].hessian

    def of_tensors(outputs: Tensor, v: Tensor) -> Tensor:
        if not isinstance(outputs, Tensor):
            raise TypeError(f"expected a tensor of outputs, got a {type(outputs).__name__}")
        return hessian(outputs, v)

    return of_tensors


def _named(loss_fn: LossFunction, likelihood: str | None) -> str:
    """Name of the likelihood given, or of the loss."""
    if likelihood is not None:
        return likelihood
    if loss_fn is not nn.functional.cross_entropy and not isinstance(loss_fn, nn.CrossEntropyLoss):
        raise ValueError(
            "expected likelihood= for the true Fisher matrix (labels='model') of another loss than cross_entropy: "
            "'categorical', 'gaussian', 'bernoulli' or a function (outputs, generator) -> targets"
        )
    return "categorical"


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw classes from logits [N, C, ...]."""
    probabilities = _finite(logits).float().softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(probabilities.shape[:-1])


def _informative_classes(logits: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw classes from logits [N, C] as often as they matter for the Fisher matrix, and a factor for each.

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
    """Draw values of variance 1/2, of which the loss (y - mean)^2 is the negative log-likelihood."""
    noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return _finite(mean) + noise * 0.5**0.5


def _bernoulli(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw zeros and ones from logits."""
    return torch.bernoulli(_finite(logits).sigmoid(), generator=generator)


def _finite(outputs: Tensor) -> Tensor:
    if not outputs.isfinite().all():
        raise ValueError("the model's outputs, which labels are to be sampled from, contain NaN or inf")
    return outputs


def _categorical_hessian(logits: Tensor, v: Tensor) -> Tensor:
    """Multiply by diag(p) - p p^T, for classes in dimension 1."""
    p = logits.softmax(1)
    return p * (v - (p * v).sum(1, keepdim=True)) * (logits.shape[1] / logits.numel())


def _gaussian_hessian(mean: Tensor, v: Tensor) -> Tensor:
    return 2 * v / mean.numel()


def _bernoulli_hessian(logits: Tensor, v: Tensor) -> Tensor:
    p = logits.sigmoid()
    return p * (1 - p) * v / logits.numel()


LIKELIHOODS = {
    "categorical": NamedLikelihood(_categorical, _categorical_hessian, _informative_classes),
    "gaussian": NamedLikelihood(_gaussian, _gaussian_hessian),
    "bernoulli": NamedLikelihood(_bernoulli, _bernoulli_hessian),
}
