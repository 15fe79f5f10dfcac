"""Pruning with what the optimizer has learned."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.optim import FishLeg
from optim.problems import Tied, backward, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")  # nn.GRU


def test_it_prunes_without_data(generator):
    net, optimizer, x, y = trained(generator)
    blind = copy.deepcopy(net)
    prune(blind, None, sparsity=0.7, curvature="identity", progress=False)
    # What is given anyway is not read, nor asked for a likelihood.
    with_data = copy.deepcopy(net)
    prune(with_data, [(x, y)], F.mse_loss, sparsity=0.7, curvature=optimizer.curvature, progress=False)
    result = prune(net, None, sparsity=0.7, curvature=optimizer.curvature, progress=False)
    assert torch.equal(with_data[0].weight, net[0].weight)
    assert result.sparsity == pytest.approx(0.7, abs=0.01)
    loss = lambda model: F.cross_entropy(model(x), y).item()
    assert loss(net) < loss(blind)


def test_its_curvature_is_that_of_its_factors(generator):
    net, optimizer, *_ = trained(generator)
    pruner = Pruner(net, curvature=optimizer.curvature, progress=False)
    pruner.estimate()
    for layer in optimizer._layers:
        row, col, _ = pruner.curvature.factors(layer.name)
        root = 1e-8**0.5
        torch.testing.assert_close(row, 1 / (layer.running.row_moment.diagonal() + root))
        expected = torch.linalg.inv(layer.running.col_moment + root * torch.eye(len(col)).double())
        torch.testing.assert_close(col, expected)


def test_pruned_weights_stay_zero_while_it_goes_on(generator):
    net, optimizer, x, y = trained(generator)
    pruner = Pruner(net, curvature=optimizer.curvature, progress=False)
    pruner.attach(optimizer)
    for sparsity in (0.5, 0.8):
        pruner.estimate()
        pruner.prune_to(sparsity)
        before = F.cross_entropy(net(x), y).item()
        train(net, optimizer, x, y, 10)
        assert F.cross_entropy(net(x), y).item() < before
        for name, mask in pruner.masks.items():
            weight = net.get_parameter(name)
            assert (weight[~mask] == 0).all()
            assert (optimizer.state[weight]["momentum"][~mask] == 0).all()
    assert pruner.finalize().sparsity == pytest.approx(0.8, abs=0.01)


def test_masks_are_followed_until_they_are_not(generator):
    """Within masks the step is what Q makes of the masked gradient, masked."""
    net, optimizer, x, y = trained(generator, momentum=0.0)
    mask = torch.rand(16, 12, generator=generator) < 0.5
    handle = optimizer.follow_masks(lambda: [(net[0].weight, mask)])
    for follows in (True, False):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        backward(net, x, y)
        optimizer.step()
        layer = optimizer._layers[0]
        moved = layer.matrix({name: before[name] - net.get_parameter(name).detach() for name in ("0.weight", "0.bias")})
        kept = torch.cat([mask if follows else torch.ones_like(mask), torch.ones(16, 1, dtype=torch.bool)], 1)
        gradient = layer.matrix({name: net.get_parameter(name).grad for name in ("0.weight", "0.bias")}) * kept
        direction = layer.running.row @ gradient @ layer.running.col * kept
        torch.testing.assert_close(moved, float((moved * direction).sum() / direction.square().sum()) * direction)
        handle.remove()


def test_masks_belong_to_parameters_and_go_with_their_handle(generator):
    """A pruner of a part of the model has other names for its parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    pruner = Pruner(net[1], curvature="identity", progress=False)
    handle = pruner.attach(optimizer)
    pruner.estimate()
    pruner.prune_to(0.5)
    before = net[0].weight.detach().clone()
    train(net, optimizer, x, y, 2)
    assert (net[0].weight != before).all()
    assert (net[1][0].weight == 0).sum() == 32
    handle.remove()
    train(net, optimizer, x, y, 1)
    assert (net[1][0].weight == 0).sum() == 0


def test_a_lookup_that_is_pruned_has_a_diagonal(generator):
    torch.manual_seed(0)
    net, tokens = Tied(), torch.randint(11, (6, 5), generator=generator)
    optimizer = FishLeg(net, likelihood="tokens")
    F.cross_entropy(net(tokens).movedim(-1, 1), tokens).backward()
    optimizer.step()
    pruner = Pruner(net, curvature=optimizer.curvature, params=["embedding.weight"], progress=False)
    pruner.estimate()
    squares = next(other for other in optimizer._others if other.name == "embedding.weight").squares
    torch.testing.assert_close(pruner.curvature.diag()["embedding.weight"], 1 / (squares + 1e-8))
    copy.deepcopy(pruner).estimate()


def test_columns_follow_the_order_of_a_pattern(generator):
    """n:m patterns see convolutions with their channels last."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.randn(16, 4, 4, 4, generator=generator).double(), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical", params=[net[0].weight, net[2].weight])
    train(net, optimizer, x, y, 3)
    factors = {}
    for pattern in ("unstructured", "2:4"):
        pruner = Pruner(net, curvature=optimizer.curvature, pattern=pattern, params=["0.weight"], progress=False)
        with pytest.raises(ValueError, match=r"does not have 0\.bias, which would be compensated with 0\.weight"):
            pruner.estimate()
    net[0].bias = None
    for pattern in ("unstructured", "2:4"):
        pruner = Pruner(net, curvature=optimizer.curvature, pattern=pattern, params=["0.weight"], progress=False)
        pruner.estimate()
        factors[pattern] = pruner.curvature.factors("0.weight").col
    order = torch.arange(36).reshape(4, 3, 3).permute(1, 2, 0).flatten()
    torch.testing.assert_close(factors["2:4"], factors["unstructured"][order][:, order])


def test_curvature_before_the_first_step_and_of_other_models(generator):
    net, optimizer, *_ = trained(generator)
    fresh = FishLeg(net, likelihood="categorical")
    with pytest.raises(ValueError, match="has taken no step"):
        prune(net, None, sparsity=0.5, curvature=fresh.curvature, progress=False)
    other = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    with pytest.raises(ValueError, match=r"0\.weight is not the weight that the optimizer has"):
        prune(other, None, sparsity=0.5, curvature=optimizer.curvature, progress=False)
