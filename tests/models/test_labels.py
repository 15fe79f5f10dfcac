"""Drawn labels, ignored targets and class weights, against values written out."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext import Pruner
from models.functions import (
    Net,
    assert_alike,
    prune,
)


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.h = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.h(torch.tanh(self.a(x))).transpose(1, 2)  # [N, C, T]


@pytest.mark.parametrize("ignored", [-100, 7])
def test_labels_are_not_drawn_where_targets_are_ignored(ignored, generator):
    """One position of five is left, for which the trace of the Fisher matrix of the head is written out."""
    x = torch.randn(4000, 5, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (4000, 5), generator=generator)
    x[:, 1:], y[:, 1:] = 3, ignored
    model = Segments().double()
    loss_fn = F.cross_entropy if ignored == -100 else nn.CrossEntropyLoss(ignore_index=ignored)
    pruner = Pruner(model, curvature="diagonal", labels="model", num_grads=4000, progress=False)
    pruner.estimate([(x, y)], loss_fn)
    with torch.no_grad():
        hidden = torch.tanh(model.a(x[:, 0]))
        p = model.h(hidden).softmax(1)
    expected = float(((1 - p.square().sum(1)) * hidden.square().sum(1)).mean())
    assert float(pruner.curvature._squares["h.weight"].sum()) / 4000 == pytest.approx(expected, rel=0.02)


class LanguageModel(nn.Module):
    def __init__(self, shape=lambda z: z):
        super().__init__()
        torch.manual_seed(2)
        self.e, self.h, self.shape = nn.Embedding(11, 8), nn.Linear(8, 11), shape

    def forward(self, ids):
        return self.shape(self.h(self.e(ids)))


def flat_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("length", [6, 11])
def test_classes_in_the_last_dimension(length, generator):
    ids = torch.randint(0, 11, (24, length), generator=generator)
    options = {"labels": "model", "curvature": "diagonal"}
    with pytest.raises(ValueError, match="'tokens' and 'next_token'"):
        prune(LanguageModel(), (ids, ids), flat_loss, likelihood="categorical", **options)
    tokens = prune(LanguageModel(), (ids, ids), flat_loss, likelihood="tokens", **options)
    moved = prune(LanguageModel(lambda z: z.mT), (ids, ids), **options)
    assert_alike(tokens, moved)


def test_the_next_token_is_drawn_from_its_own_logits(generator):
    ids = torch.randint(0, 11, (400, 5), generator=generator)
    ids[:, -1] = -100
    sampler = fishleg_ext.observation.likelihoods.label_sampler("model", flat_loss, "next_token")
    logits = torch.full((400, 5, 11), -50.0)
    wanted = torch.randint(0, 11, (400, 5), generator=generator)
    logits.scatter_(2, wanted[..., None], 50.0)
    drawn, factor = sampler.draw(generator, logits, ids, 400, 400)
    assert torch.equal(drawn[:, 0], ids[:, 0])
    assert torch.equal(drawn[:, 1:4], wanted[:, :3])
    assert (drawn[:, 4] == -100).all()
    assert (torch.as_tensor(factor) == 3**0.5).all()


def test_drawn_labels_that_the_loss_does_not_read_are_an_error(data):
    own = lambda outputs, generator: torch.randint(0, 3, (len(outputs),), generator=generator)
    options = {"labels": "model", "likelihood": own}
    for curvature in ("block", "kronecker"):
        with pytest.raises(ValueError, match="the loss does not depend on the targets that are drawn"):
            prune(Net(), data, lambda outputs, _: outputs.square().mean(), curvature=curvature, **options)
        prune(Net(), data, curvature=curvature, **options)


@pytest.mark.parametrize("curvature", ["block", "kronecker", "fishleg"])
def test_class_weights_multiply_the_loss_of_a_sample(curvature, data):
    weight = torch.tensor([100.0, 1.0, 1.0])
    written_out = lambda o, t: (weight[t] * F.cross_entropy(o, t, reduction="none")).mean()
    options = {"curvature": curvature, "labels": "data", "damping": 1e-2}
    results = [
        prune(Net(), data, f, **options) for f in (nn.CrossEntropyLoss(weight=weight), written_out, F.cross_entropy)
    ]
    assert_alike(results[0], results[1])
    assert results[0].predicted_loss_increase != pytest.approx(results[2].predicted_loss_increase, rel=0.1)
    with pytest.raises(ValueError, match=r"labels='model' cannot be combined with CrossEntropyLoss\(weight=...\)"):
        prune(Net(), data, nn.CrossEntropyLoss(weight=weight), labels="model")
    partial = functools.partial(F.cross_entropy, weight=weight)
    assert_alike(prune(Net(), data, partial, **options), results[1])
    likelihoods = nn.Sequential(Net(), nn.LogSoftmax(1)), nn.Sequential(Net(), nn.Identity())
    losses = nn.NLLLoss(weight=weight), nn.CrossEntropyLoss(weight=weight)
    assert_alike(*(prune(net, data, loss, **options) for net, loss in zip(likelihoods, losses, strict=True)))


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
def test_sums_over_samples_are_means(loss, labels, data):
    x, y = data
    likelihood = "gaussian" if loss is nn.MSELoss and labels == "model" else None
    targets = F.one_hot(y, 3).float() if loss is nn.MSELoss else y
    options = {
        "grad_batch_size": 4,
        "num_grads": 6,
        "labels": labels,
        "likelihood": likelihood,
        "curvature": "diagonal",
    }
    scale = 3 if loss is nn.MSELoss else 1  # a sum over three outputs, where the mean divides
    totals = []
    for reduction in ("sum", "mean"):
        pruner = Pruner(Net(), progress=False, **options)
        pruner.estimate([(x, targets)], loss(reduction=reduction))
        totals.append(float(pruner.curvature._squares["a.weight"].sum()))
    power = 2 if labels == "data" else 1 + (loss is nn.MSELoss) * 0
    assert totals[0] == pytest.approx(totals[1] * scale**power, rel=1e-4)
