"""Labels that a model draws itself, and of what loss their gradients are."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.waiting import read
from fishleg_ext.observation.batches import checked_source
from fishleg_ext.observation.forward import scalar_loss
from fishleg_ext.observation.likelihoods import (
    IGNORED,
    LIKELIHOODS,
    Likelihood,
    LossFunction,
    NamedLikelihood,
    as_module,
    checked_likelihood,
    label_sampler,
    logits_of,
    sample_loss,
)
from fishleg_ext.observation.outputs import OutputTree

# The cosine of two gradients above which one is taken for a multiple of the other.
SAME_LOSS = 0.99


def checked_loss(likelihood: Likelihood | None, loss_fn: LossFunction | None) -> tuple[Likelihood, LossFunction | None]:
    """Return the likelihood, and the loss where one is given.

    Raises:
        ValueError: there is no likelihood, it is unknown, or it is a function without a loss; class weights.
        TypeError: the loss is no function.
    """
    if likelihood is None:
        raise ValueError(
            f"expected likelihood=, which labels for the curvature are drawn from: {', '.join(map(repr, LIKELIHOODS))} "
            "or a function (outputs, generator) -> targets"
        )
    checked_likelihood("likelihood", likelihood)
    _, loss_fn = checked_source(None, loss_fn)
    if loss_fn is None and not isinstance(likelihood, str):
        raise ValueError("expected loss_fn=, the loss that is minimised, beside a likelihood that is a function")
    loss = as_module(loss_fn)
    if isinstance(loss, nn.modules.loss._WeightedLoss) and loss.weight is not None and isinstance(likelihood, str):
        raise ValueError(
            "expected a loss_fn without class weights, with which it is the negative log-likelihood of no "
            f"distribution, got {type(loss).__name__}(weight=...); leave loss_fn out, so that the curvature is that "
            "of the loss without them, or give a function as likelihood"
        )
    return likelihood, loss_fn


class Labels:
    """Draws labels for outputs, with what gradients of the loss are to be multiplied by.

    The mean square of these gradients is then the curvature of the mean negative log-likelihood, of which the loss may
    be any multiple.

    Args:
        likelihood, loss_fn: see `checked_loss`.
        device: of random numbers.

    Attributes:
        loss: (outputs, targets) -> scalar, as a mean over samples.
        scale: by how many times that is the mean negative log-likelihood, as of the last draw; 1 where the likelihood
            is a function.
        summed: whether the loss that was given is the sum over samples.
        is_checked: whether the loss is known to fit, as at the first draw.
        generator: of random numbers.
    """

    def __init__(self, likelihood: Likelihood, loss_fn: LossFunction | None, device: torch.device) -> None:
        self._named = LIKELIHOODS[likelihood] if isinstance(likelihood, str) else None
        if loss_fn is None:
            assert self._named is not None
            named = self._named.loss
            self.loss: LossFunction = lambda outputs, targets: named(logits_of(outputs), targets)
        else:
            self.loss = sample_loss(loss_fn) or loss_fn
        sampler = label_sampler("model", loss_fn or self.loss, likelihood)
        assert sampler is not None
        self._sampler = sampler
        loss = as_module(loss_fn)
        self.summed = isinstance(loss, nn.modules.loss._Loss) and loss.reduction == "sum"
        self._is_given = loss_fn is not None
        self.generator = torch.Generator(device)
        self.scale = 1.0
        self.is_checked = False

    def __call__(self, outputs: Any, targets: Any, samples: int, count: int) -> tuple[Any, float | Tensor]:
        """Draw labels, see `LabelSampler.draw`."""
        drawn, factor = self._sampler.draw(self.generator, outputs, targets, samples, count)
        if not self.is_checked:
            self._sampler.check(self.loss, outputs, drawn)
        if self._named is not None and self._is_given:
            self._measure_scale(self._named, outputs, drawn, samples)
            # The Fisher matrix of a sum over t targets is t times that of their mean.
            factor = factor / (self.scale**0.5 if self.summed else self.scale)
        self.is_checked = True
        return drawn, factor

    def _measure_scale(self, named: NamedLikelihood, outputs: Any, drawn: Any, samples: int) -> None:
        """Update the scale, unless the gradients are too small or too unlike to tell.

        Raises:
            ValueError: at the first draw, the loss is of another sign, or a sum over samples.
        """
        ignored = self._sampler.ignore_index
        scale, cosine = loss_scale(self.loss, named, outputs, drawn, ignored)
        if not self.is_checked and cosine < 0:
            raise ValueError(
                "expected loss_fn to be a multiple of the negative logarithm of the likelihood, but its gradients do "
                "not point the same way; a function may be given as likelihood"
            )
        if not self.is_checked and isinstance(outputs, Tensor) and samples > 1:
            half = samples // 2
            of_half, _ = loss_scale(self.loss, named, outputs[:half], drawn[:half], ignored)
            if math.isclose(scale, of_half * samples / half, rel_tol=1e-3) and scale:
                raise ValueError(
                    "expected loss_fn to be a mean over samples, or a module of PyTorch with reduction='sum', got "
                    f"one that is {samples / half:.3g} times as large for {samples} samples as for {half}"
                )
        if cosine > (SAME_LOSS if self.is_checked else 0):  # it may change, of a sum over tokens
            self.scale = scale


def loss_scale(
    loss_fn: LossFunction, likelihood: NamedLikelihood, outputs: Any, targets: Any, ignore_index: int
) -> tuple[float, float]:
    """Compare the gradient of a loss by the outputs with that of the mean negative log-likelihood.

    Args:
        loss_fn: (outputs, targets) -> scalar.
        likelihood: whose loss it is to be a multiple of.
        outputs: of the model; a tensor, or what has one as `logits`.
        targets: drawn for them.
        ignore_index: class of the targets that the loss leaves out.

    Returns:
        how many times the one is the other, and the cosine of the two; 0 where either vanishes.
    """
    tree, logits = OutputTree(outputs), logits_of(outputs)
    free = logits.detach().requires_grad_()
    given = tree.with_leaves([free if leaf is logits else leaf for leaf in tree.leaves])
    named_targets = targets
    if likelihood.class_dim is not None and not targets.is_floating_point():
        named_targets = torch.where(targets == ignore_index, IGNORED, targets)
    with torch.enable_grad():
        losses = scalar_loss(loss_fn, given, targets), likelihood.loss(free, named_targets)
    theirs, named = (torch.autograd.grad(loss, free)[0].to(widened(free.dtype)) for loss in losses)
    pairs = ((theirs, named), (named, named), (theirs, theirs))
    product, squared, other = read([(a * b).sum(dtype=torch.float64) for a, b in pairs])
    if not squared or not other:
        return 0.0, 0.0
    return product / squared, product / (squared * other) ** 0.5
