"""Factors of gradients: whose rows they are, and that they make up the gradient of each sample."""

import pytest
import torch
from models.functions import Experts, SharedRows, Tokens
from recorder import small_net, weights_of
from torch import nn
from torch.nn import functional as F

from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.factors import sample_factors
from fishleg_ext.sparsity.parameters import orientations_of

MODELS = {
    "tokens": lambda: Tokens("plain"),
    "flat tokens": lambda: Tokens("flat"),
    "positions first, as many as samples": lambda: Tokens("positions first"),
    "one position after the other": lambda: Tokens("one by one"),
    "experts": lambda: Experts("skipped", used=3),
}


@pytest.mark.parametrize("name", MODELS)
def test_factors_make_up_the_gradient_of_each_sample(name, generator):
    model = MODELS[name]().double().eval()
    x, y = (
        torch.randn(6, 6, 8, dtype=torch.float64, generator=generator),
        torch.randint(0, 3, (6,), generator=generator),
    )
    weights = {n: p for n, p in model.named_parameters() if p.dim() > 1}
    orientations = orientations_of(model, weights)
    if "experts" in weights:
        orientations["experts"] = type(orientations["experts"]).of((3, 8, 8), num_out=2)
    factors = sample_factors(model, F.cross_entropy, weights, Chunk(x, y, 6), orientations=orientations)
    for s in range(6):
        loss = F.cross_entropy(model(x[s : s + 1]), y[s : s + 1])
        for (n, weight), expected in zip(
            weights.items(), torch.autograd.grad(loss, list(weights.values())), strict=True
        ):
            made = torch.zeros(orientations[n].matrix_shape, dtype=torch.float64).flatten(1)
            for product in factors[n]:
                made[slice(*product.outputs)] += product.gradient(s)
            torch.testing.assert_close(made, orientations[n].to_matrix(expected.detach()).flatten(1))
            assert weight.grad is None


def test_factors_of_convolutions_in_float32(generator):
    net = small_net().eval()
    x, y = torch.randn(64, 2, 4, 4, generator=generator), torch.randint(0, 3, (64,), generator=generator)
    factors = sample_factors(net, F.cross_entropy, weights_of(net), Chunk(x, y, 64))
    for s in (0, 31, 63):
        loss = F.cross_entropy(net(x[s : s + 1]), y[s : s + 1])
        expected = torch.autograd.grad(loss, list(weights_of(net).values()))
        for (product,), gradient in zip(factors.values(), expected, strict=True):
            torch.testing.assert_close(product.gradient(s), gradient.flatten(1), rtol=1e-4, atol=1e-6)


def test_rows_of_several_samples_have_no_factors(generator):
    model = SharedRows().eval()
    x, y = torch.randn(6, 8, generator=generator), torch.randint(0, 3, (6,), generator=generator)
    with pytest.raises(ValueError, match="rows of project.weight belong to several samples"):
        sample_factors(model, F.cross_entropy, {"project.weight": model.project.weight}, Chunk(x, y, 6))
    unused = nn.Sequential(nn.Linear(8, 3), nn.Linear(3, 3))
    unused.forward = unused[0].forward
    weights = dict(unused.named_parameters())
    assert sample_factors(unused, F.cross_entropy, {"1.weight": weights["1.weight"]}, Chunk(x, y, 6)) == {
        "1.weight": []
    }
