"""Targets sampled from a model's own likelihood, with which mean g g^T estimates the true Fisher matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn

LossFunction = Callable[[Any, Any], Tensor]
Likelihood = Union[str, Callable[[Any, torch.Generator], Any]]


class LabelSampler(NamedTuple):
    """How targets are drawn from a model's outputs.

    Attributes:
        draw: (outputs, generator) -> targets.
        terms: targets of n samples -> how many independent terms the loss is the mean of.
    """

    draw: Callable[[Any, torch.Generator], Any]
    terms: Callable[[Any, int], int]


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
    if likelihood is None:
        if loss_fn is not nn.functional.cross_entropy and not isinstance(loss_fn, nn.CrossEntropyLoss):
            raise ValueError(
                "expected likelihood= with labels='model' and another loss than cross_entropy: "
                "'categorical', 'gaussian', 'bernoulli' or a function (outputs, generator) -> targets"
            )
        likelihood = "categorical"
    return LabelSampler(SAMPLERS[likelihood], lambda targets, samples: targets.numel())


def _categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Classes from logits [N, C, ...]."""
    probabilities = _finite(logits).float().softmax(1).movedim(1, -1)
    drawn = torch.multinomial(probabilities.flatten(0, -2), 1, generator=generator)
    return drawn.reshape(probabilities.shape[:-1])


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


SAMPLERS = {"categorical": _categorical, "gaussian": _gaussian, "bernoulli": _bernoulli}
