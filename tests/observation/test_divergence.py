"""The divergence of a pruned network from the dense one."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import PruneConfig, Pruner, prune

OPTIONS = {"sparsity": 0.5, "num_grads": 16, "progress": False}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()


@pytest.fixture
def inputs(generator):
    return torch.randn(48, 6, dtype=torch.float64, generator=generator)


KINDS = {
    "categorical": (
        F.cross_entropy,
        lambda z: torch.distributions.Categorical(logits=z),
        lambda x: torch.zeros(len(x)).long(),
    ),
    "gaussian": (
        F.mse_loss,
        lambda z: torch.distributions.Normal(z, 0.5**0.5),
        lambda x: torch.zeros(len(x), 3, dtype=torch.float64),
    ),
    "bernoulli": (
        F.binary_cross_entropy_with_logits,
        lambda z: torch.distributions.Bernoulli(logits=z),
        lambda x: torch.zeros(len(x), 3, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_that_of_torch_on_the_samples_after_those_of_the_estimate(kind, net, inputs):
    loss_fn, distribution, targets = KINDS[kind]
    dense, data = copy.deepcopy(net), [(x, targets(x)) for x in inputs.split(10)]
    result = prune(net, data, loss_fn, labels="model", likelihood=kind, holdout=20, **OPTIONS)
    both = (distribution(model(inputs[16:36]).detach()) for model in (dense, net))
    expected = torch.distributions.kl_divergence(*both).mean()
    assert result.divergence == pytest.approx(float(expected), rel=1e-6)
    assert result.divergence_ratio == result.divergence / result.predicted_loss_increase
    assert prune(dense, data, loss_fn, labels="model", likelihood=kind, **OPTIONS).divergence is None


def test_a_small_step_costs_what_is_predicted(net, inputs):
    """Half of dw^T F dw, for the true Fisher matrix of all weights together."""
    with torch.no_grad():
        net[0].weight[torch.rand(8, 6, generator=torch.Generator().manual_seed(0)) < 0.5] *= 1e-3
    x = inputs.repeat(40, 1)
    data = [(x, torch.zeros(len(x)).long())]
    options = {"labels": "model", "num_grads": 1536, "block_size": 10**6, "damping": 1e-9, "params": "0.weight"}
    result = prune(net, data, sparsity=0.4, holdout=384, progress=False, **options)
    assert result.divergence_ratio == pytest.approx(1, rel=0.35)


def test_of_next_tokens_those_that_are_ignored_are_left_out(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 7)).double()
    dense, ids = copy.deepcopy(net), torch.randint(0, 7, (12, 5), generator=generator)
    targets = ids.clone()
    targets[:, 3:] = -100
    loss_fn = lambda o, t: F.cross_entropy(o[:, :-1].flatten(0, 1), t[:, 1:].flatten())
    options = {"likelihood": "next_token", "labels": "model", "num_grads": 8, "holdout": 4, "progress": False}
    result = prune(net, [(ids, targets)], loss_fn, sparsity=0.5, **options)
    both = (torch.distributions.Categorical(logits=model(ids[8:, :2]).detach()) for model in (dense, net))
    assert result.divergence == pytest.approx(float(torch.distributions.kl_divergence(*both).mean()), rel=1e-6)


def test_what_cannot_be_measured_is_said_before_and_changes_nothing(net, inputs):
    data, before = [(inputs, torch.zeros(48).long())], copy.deepcopy(net.state_dict())
    for options, match in (
        ({"holdout": 4, "loss_fn": lambda o, t: o.sum()}, "expected likelihood="),
        ({"holdout": 4, "data": iter(data)}, "holdout=4"),
        ({"holdout": 4, "data": None, "curvature": "identity"}, "holdout=4 needs data"),
        ({"holdout": 4, "num_grads": 48}, "samples after the first 48.* got 48 in all"),
        ({"holdout": -1}, "holdout"),
    ):
        with pytest.raises(ValueError, match=match):
            prune(net, **{"data": data} | OPTIONS | options)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    with pytest.raises(ValueError, match="holdout=4 of the config is for prune alone"):
        Pruner(net, PruneConfig(holdout=4))


def test_the_table_says_what_was_pruned_and_why_not(net, inputs):
    net = nn.Sequential(net, nn.Bilinear(2, 2, 2).double())
    net.forward = net[0].forward
    with pytest.warns(UserWarning, match="stay dense"):
        table = prune(net, [(inputs, torch.zeros(48).long())], pattern="2:4", num_grads=16, progress=False).table()
    lines = table.splitlines()
    assert lines[0].split() == ["parameter", "shape", "pruned", "pattern", "why", "it", "is", "dense"]
    assert lines[1].split() == ["0.2.weight", "[3,", "8]", "50.00%", "2:4"]
    assert lines[2].split() == ["all", "24", "weights", "50.00%"]
    assert "its input channels, 6, is no multiple of 4" in lines[4] + lines[3]
    assert "it is the weight of no Linear or Conv layer; params can name it" in table
