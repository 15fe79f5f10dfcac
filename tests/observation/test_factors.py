"""Gradients in factors: whose rows they are, that they make up the gradient of each group, and what has none."""

import pytest
import torch
from models.functions import Experts, SharedRows, Tokens
from recorder import small_net, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.factors import FactorObserver, NoFactors
from fishleg_ext.sparsity.parameters import orientations_of

MODELS = ("plain", "flat", "positions first", "one by one")


def observer(model, weights, orientations=None, biases=None, draw=None):
    return FactorObserver(model, F.cross_entropy, weights, draw, orientations or {}, biases or {})


@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("kind", MODELS)
def test_factors_make_up_the_gradient_of_each_group(kind, group, generator):
    model = Tokens(kind).double().eval()
    x = torch.randn(6, 6, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (6,), generator=generator)
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    biases = {
        n: (b, model.get_parameter(b))
        for n in weights
        if (b := n.replace("weight", "bias")) in dict(model.named_parameters())
    }
    orientations = orientations_of(model, weights)
    factors, _, _ = observer(model, weights, orientations, biases).factors(Chunk(x, y, 6), 6 // group)
    assert factors.keys() == weights.keys()
    for s in range(6 // group):
        own = slice(s * group, (s + 1) * group)
        wanted = {**weights, **dict(biases.values())}
        expected = dict(
            zip(wanted, torch.autograd.grad(F.cross_entropy(model(x[own]), y[own]), list(wanted.values())), strict=True)
        )
        for n, of_name in factors.items():
            matrix = orientations[n].to_matrix(expected[n]).flatten(1)
            torch.testing.assert_close(of_name.gradients()[s], matrix)
            torch.testing.assert_close(of_name.part(s, s + 1).gradients()[0], matrix)
            inputs, gradients = of_name.matrices()
            assert inputs.shape[1] == of_name.rows
            torch.testing.assert_close(gradients[s].mT @ inputs[s], matrix)
            if n in biases:
                torch.testing.assert_close(of_name.bias_gradients()[s], expected[biases[n][0]])


def test_factors_of_convolutions_in_float32(generator):
    net = small_net().eval()
    x, y = torch.randn(64, 2, 4, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    factors, _, _ = observer(net, weights_of(net)).factors(Chunk(x, y, 64), 64)
    for s in (0, 31, 63):
        loss = F.cross_entropy(net(x[s : s + 1]), y[s : s + 1])
        expected = torch.autograd.grad(loss, list(weights_of(net).values()))
        for of_name, gradient in zip(factors.values(), expected, strict=True):
            torch.testing.assert_close(of_name.gradients()[s], gradient.flatten(1), rtol=1e-4, atol=1e-6)


def test_grouped_and_shared_weights(generator):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            x = self.grouped(x).tanh().mean(-1).mT  # [N, positions, 6]
            return self.shared(self.shared(x).tanh()).mean(1)

    net = Net().double()
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 6, (5,), generator=generator)
    weights = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    factors, _, _ = observer(net, weights).factors(Chunk(x, y, 5), 5)
    assert not factors["grouped.weight"].whole
    for s in range(5):
        expected = torch.autograd.grad(F.cross_entropy(net(x[s : s + 1]), y[s : s + 1]), list(weights.values()))
        for of_name, gradient in zip(factors.values(), expected, strict=True):
            torch.testing.assert_close(of_name.gradients()[s], gradient.flatten(1))


def test_weights_without_factors_are_left_to_others(generator):
    """Experts have rows of some samples alone, norms do not multiply matrices, and an embedding is looked up."""
    model = Experts("skipped", used=3).double().eval()
    x, y = (
        torch.randn(6, 6, 8, dtype=torch.float64, generator=generator),
        torch.randint(0, 3, (6,), generator=generator),
    )
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    orientations = orientations_of(model, weights)
    orientations["experts"] = type(orientations["experts"]).of((3, 8, 8), num_out=2)
    factors, _, _ = observer(model, weights, orientations).factors(Chunk(x, y, 6), 6)
    assert factors.keys() == weights.keys() - {"experts"}
    net = nn.Sequential(nn.Embedding(5, 4), nn.LayerNorm(4), nn.Flatten(), nn.Linear(12, 3))
    tokens, y = torch.randint(0, 5, (6, 3), generator=generator), torch.randint(0, 3, (6,), generator=generator)
    weights = {n: p for n, p in net.named_parameters() if n.endswith("weight")}
    factors, _, _ = observer(net, weights).factors(Chunk(tokens, y, 6), 6)
    assert factors.keys() == {"3.weight"}


def test_rows_of_several_samples_have_no_factors(generator):
    model = SharedRows().eval()
    x, y = torch.randn(6, 8, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    with pytest.raises(NoFactors, match="rows of the inputs of project.weight belong to several samples"):
        observer(model, {"project.weight": model.project.weight}).factors(Chunk(x, y, 6), 6)


def test_a_later_batch_whose_samples_influence_each_other_is_noticed(generator):
    """Though its sequence of products is that of the first."""

    class Late(nn.Linear):
        coupled = False

        def forward(self, x):
            return super().forward(x + x.mean(0)) if self.coupled else super().forward(x)

    net = Late(4, 3)
    x, y = torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    source = observer(net, {"weight": net.weight})
    source.factors(Chunk(x, y, 6), 6)
    net.coupled = True
    with pytest.raises(NoFactors, match="weight are others for a single sample"):
        source.factors(Chunk(x, y, 6), 6)


def test_labels_are_drawn_from_the_same_outputs(generator):
    """One forward pass serves the labels and the gradients, which are scaled as the labels say."""
    net, calls = nn.Linear(4, 3), []
    net.register_forward_hook(lambda *_: calls.append(1))
    x, y = torch.randn(6, 4, generator=generator), torch.zeros(6, dtype=torch.long)
    scale = torch.arange(1.0, 7.0)
    draw = lambda outputs, targets, samples, count: (outputs.argmin(1), scale)
    source = observer(net, {"weight": net.weight}, draw=draw)
    source.factors(Chunk(x, y, 6), 6)
    source.factors(Chunk(x, y, 6), 6)
    before = len(calls)
    factors, targets, _ = source.factors(Chunk(x, y, 6), 6)  # the third, which is not compared with a single sample
    assert len(calls) == before + 1
    assert torch.equal(targets, net(x).argmin(1))
    for s in range(6):
        loss = F.cross_entropy(net(x[s : s + 1]), targets[s : s + 1])
        want = scale[s] * torch.autograd.grad(loss, net.weight)[0]
        torch.testing.assert_close(factors["weight"].gradients()[s], want)
