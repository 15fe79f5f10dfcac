"""Losses that are multiples of that of the likelihood, or are not."""

import dataclasses
import functools
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.optim import FishLeg
from optim.problems import backward, intact, small


def tokens(outputs, targets, reduction="mean"):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction=reduction)


def times(loss, factor):
    return lambda outputs, targets: factor * loss(outputs, targets)


def summed(loss):
    """The sum over the targets of a sample, as a mean over samples."""
    return lambda outputs, targets: loss(outputs, targets, reduction="sum") / len(outputs)


LOSSES = {  # likelihood -> the mean of its loss, and multiples of it
    "categorical": [F.cross_entropy, times(F.cross_entropy, 100.0), nn.CrossEntropyLoss(reduction="sum")],
    "gaussian": [F.mse_loss, times(F.mse_loss, 0.01), nn.MSELoss(reduction="sum"), summed(F.mse_loss)],
    "bernoulli": [
        F.binary_cross_entropy_with_logits,
        nn.BCEWithLogitsLoss(reduction="sum"),
        summed(F.binary_cross_entropy_with_logits),
    ],
    "tokens": [tokens, summed(tokens), times(tokens, 7.0)],
}


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
@pytest.mark.parametrize("likelihood", LOSSES)
@pytest.mark.parametrize("norm", [False, True])
def test_steps_are_the_same_for_every_multiple_of_the_loss(norm, likelihood, curvature, generator):
    x = torch.randn(140, 5, 8, generator=generator).double()
    if likelihood != "tokens":
        x = x[:, 0]
    y = x[..., :4].argmax(-1) if likelihood in ("categorical", "tokens") else x[..., :4].sigmoid()
    found = []
    for number, loss in enumerate(LOSSES[likelihood]):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6) if norm else nn.Tanh(), nn.Linear(6, 4)).double()
        optimizer = FishLeg(net, likelihood=likelihood, loss_fn=loss if number else None, warm_up=1)
        for samples in (140, 100, 140):
            optimizer.zero_grad()
            loss(net(x[:samples]), y[:samples]).backward()
            optimizer.step()
        found.append([p.detach() for p in net.parameters()])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            functools.partial(F.mse_loss, reduction="sum"),
            ValueError,
            "expected loss_fn to be a mean over samples",
        ),
        (lambda a, b: -F.mse_loss(a, b), ValueError, "expected loss_fn to be a multiple of the negative logarithm"),
        (lambda a, b: a.square().mean(), ValueError, "the loss does not depend on the targets that are drawn"),
    ],
    ids=["a sum", "another sign", "no targets"],
)
def test_other_losses_than_that_of_the_likelihood_are_refused(loss, error, message, generator):
    net, x, _ = small(generator)
    optimizer = FishLeg(net, likelihood="gaussian", loss_fn=loss)
    net(x).square().mean().backward()
    intact(optimizer, net, optimizer.step, error, message)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (nn.MSELoss, TypeError, "got the class MSELoss: an instance of it"),
        ("mse", TypeError, "expected loss_fn to be a function of outputs and targets"),
        (nn.CrossEntropyLoss(weight=torch.ones(3)), ValueError, "expected a loss_fn without class weights"),
    ],
    ids=["class", "name", "class weights"],
)
def test_what_is_no_loss_is_refused_at_once(loss, error, message):
    with pytest.raises(error, match=message):
        FishLeg(nn.Linear(2, 3), likelihood="categorical", loss_fn=loss)


@pytest.mark.parametrize("cuts", [(43, 43, 43), (64, 50, 15)])
def test_sums_over_several_passes_are_means_over_their_samples(cuts, generator):
    moved = []
    for reduction in ("mean", "sum"):
        net, x, y = small(generator.manual_seed(0), samples=129)
        loss = nn.CrossEntropyLoss(reduction=reduction)
        optimizer = FishLeg(net, likelihood="categorical", loss_fn=loss, max_divergence=1e9)
        for _ in range(3):
            optimizer.zero_grad()
            for a, b in zip(x.split(cuts), y.split(cuts), strict=True):
                (loss(net(a), b) * (len(a) / 129 if reduction == "mean" else 1)).backward()
            optimizer.step()
        moved.append([*net.parameters()])
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-9)


@dataclasses.dataclass(frozen=True)
class Frozen:
    logits: torch.Tensor


class Named(NamedTuple):
    logits: torch.Tensor


@pytest.mark.parametrize("kind", [Frozen, Named])
def test_a_multiple_of_the_loss_of_outputs_with_logits(kind, generator):
    class Model(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return kind(self.net(x))

    moved = []
    for loss in (None, lambda outputs, targets: 5 * F.cross_entropy(outputs.logits, targets)):
        net, x, y = small(generator.manual_seed(0))
        optimizer = FishLeg(Model(net), likelihood="categorical", loss_fn=loss)
        for _ in range(3):
            optimizer.zero_grad()
            factor = 1 if loss is None else 5
            (factor * F.cross_entropy(optimizer.model(x).logits, y)).backward()
            optimizer.step()
        moved.append([*net.parameters()])
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-9)


def test_a_loss_of_several_numbers_is_refused(generator):
    net, x, y = small(generator)
    optimizer = FishLeg(net, likelihood="categorical", loss_fn=lambda a, b: F.cross_entropy(a, b, reduction="none"))
    backward(net, x, y)
    intact(optimizer, net, optimizer.step, ValueError, "expected loss_fn to return a scalar")


@pytest.mark.parametrize("smoothing", [0.02, 0.3])
def test_label_smoothing_is_taken_for_the_loss_that_it_began_as(smoothing, generator):
    net, x, y = small(generator)
    loss = nn.CrossEntropyLoss(label_smoothing=smoothing)
    optimizer = FishLeg(net, likelihood="categorical", loss_fn=loss)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        losses.append(loss(net(x), y))
        losses[-1].backward()
        optimizer.step()
        assert 1 - smoothing <= optimizer._labels.scale * 1.05 < 1.1
    assert losses[-1] < 0.7 * losses[0]
