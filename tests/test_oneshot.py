"""prune, end to end on small networks."""

import copy
import inspect
import json

import pytest
import torch
from oracles import joint_cost, usable, with_estimate
from small import assert_same, make_net, num_weights, prunable, prune, snapshot
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import MODELS, Layerwise
from fishleg_ext.curvature.layerwise import LayerwiseEstimate

CURVATURES = [name for name in MODELS if not MODELS[name].takes_biases]
SALIENCIES = ["exact", "simultaneous"]


def test_signatures_of_the_contract():
    parameters = inspect.signature(fishleg_ext.prune).parameters
    assert list(parameters) == [
        "model",
        "data",
        "loss_fn",
        "sparsity",
        "curvature",
        "saliency",
        "scope",
        "pattern",
        "params",
        "num_grads",
        "grad_batch_size",
        "recomputations",
        "block_size",
        "damping",
        "labels",
        "likelihood",
        "recalibrate_batchnorm",
        "max_memory",
        "impl",
        "seed",
        "progress",
        "allocation",
        "min_density",
        "first_order",
        "block_by_block",
        "block_gradients",
        "offload",
        "holdout",
        "batch_fn",
    ]
    pruner = inspect.signature(fishleg_ext.Pruner).parameters
    over_time = {"config", "schedule", "data", "refine_grads", "masks"}
    assert list(pruner)[:2] == ["model", "config"]
    assert set(pruner) == set(parameters) - {"sparsity", "recomputations", "holdout"} | over_time
    assert all(pruner[n].default == parameters[n].default for n in set(pruner) - over_time - {"data"})
    assert all(pruner[n].default is None for n in over_time)
    assert parameters["loss_fn"].default is F.cross_entropy


@pytest.mark.parametrize("curvature", MODELS)
@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9])
def test_exactly_the_count_is_zero(net, data, curvature, saliency, sparsity):
    result = prune(net, data, sparsity=sparsity, curvature=curvature, saliency=saliency, scope="global")
    count = round(sparsity * num_weights(net))
    assert sum(int((~m).sum()) for m in result.masks.values()) == count
    assert result.sparsity == count / num_weights(net)
    assert list(result.masks) == list(prunable(net))
    for name, weight in prunable(net).items():
        assert result.masks[name].shape == weight.shape
        assert not weight[~result.masks[name]].any()
        assert result.layer_sparsity[name] == float((~result.masks[name]).double().mean())
    json.dumps(result.history)
    assert "masks" not in repr(result)


@pytest.mark.parametrize("curvature", MODELS)
def test_scope_layer_counts_in_each(net, data, curvature):
    result = prune(net, data, sparsity=0.63, curvature=curvature, scope="layer")
    for name, weight in prunable(net).items():
        assert int((~result.masks[name]).sum()) == round(0.63 * weight.numel())


def test_scope_of_given_sparsities(net, data):
    result = prune(net, data, scope={"4.weight": 0.8, "0.weight": 0.25}, recomputations=2)
    assert int((~result.masks["4.weight"]).sum()) == round(0.8 * 640)
    assert int((~result.masks["0.weight"]).sum()) == 9
    assert result.masks["6.weight"].all()


@pytest.mark.parametrize("curvature", ["identity", "diagonal", "block", "low_rank", "layerwise"])
def test_predicted_loss_increase_is_the_cost_of_the_step(curvature, data):
    """In float64 on a network whose Fisher matrix can be written down."""
    torch.manual_seed(0)
    net = nn.Linear(6, 3, bias=False).double()
    weight = net.weight.detach().clone()
    x = torch.randn(32, 6, dtype=torch.float64)
    y = torch.randint(0, 3, (32,))
    gradients = torch.stack(
        [
            torch.autograd.grad(F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net.weight)[0].flatten()
            for i in range(32)
        ]
    )
    fisher = gradients.mT @ gradients / 32 + 1e-3 * torch.eye(18)
    if curvature == "identity":
        fisher = torch.eye(18)
    elif curvature == "diagonal":
        fisher = fisher * torch.eye(18)
    elif curvature == "layerwise":
        moment = x.mT @ x / 32
        fisher = torch.kron(torch.eye(3), moment + 1e-3 * moment.diagonal().mean() * torch.eye(6))
    for saliency in SALIENCIES:
        again = copy.deepcopy(net)
        options = {"curvature": curvature, "saliency": saliency} | usable(curvature, block_size=18)
        result = prune(again, [(x, y)], sparsity=0.5, **options)
        step = (again.weight.detach() - weight).flatten()
        expected = 0.5 * float(step @ fisher.double() @ step)
        assert result.predicted_loss_increase == pytest.approx(expected, rel=1e-6)
        if saliency == "exact":  # the best step
            gone = ~result.masks["weight"].flatten()
            least = joint_cost(weight.flatten(), torch.linalg.inv(fisher.double()), gone)
            assert expected == pytest.approx(float(least), rel=1e-6)


def deep_net():
    """Two linear layers, the second of which sees what the first has become."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8, bias=False), nn.Linear(8, 3, bias=False)).double()


@pytest.fixture
def vectors():
    torch.manual_seed(1)
    return [(torch.randn(64, 6, dtype=torch.float64), torch.randint(0, 3, (64,)))]


def test_sequential_inputs_are_those_that_the_pruned_layers_give(vectors):
    options = {"sparsity": 0.5, "num_grads": 64, "damping": None}
    net, dense = deep_net(), deep_net()
    result = prune(net, vectors, curvature=Layerwise(1e-2, inputs="sequential"), **options)
    # The second layer alone, in a network whose first layer is the pruned one.
    dense[0].weight.data.copy_(net[0].weight)
    alone = prune(dense, vectors, curvature=Layerwise(1e-2), params="1.weight", **options)
    assert torch.equal(result.masks["1.weight"], alone.masks["1.weight"])
    assert torch.equal(net[1].weight, dense[1].weight)
    dense = deep_net()
    other = prune(dense, vectors, curvature=Layerwise(1e-2), **options)
    assert torch.equal(other.masks["0.weight"], result.masks["0.weight"])
    assert not torch.equal(dense[1].weight, net[1].weight)


def test_sequential_pruning_that_fails_half_way_changes_nothing(vectors):
    class FailingSecond(LayerwiseEstimate):
        def blocks(self, name):
            if name == "1.weight":
                raise RuntimeError("no")
            return super().blocks(name)

    net = deep_net()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match="no"):
        prune(net, vectors, sparsity=0.5, curvature=with_estimate(Layerwise, FailingSecond)(inputs="sequential"))
    assert_same(before, snapshot(net))


def test_rows_with_dead_weights_share_one_inverse(vectors):
    """In a second round each row is conditioned on its own dead weights: the joint cost is that of the formula."""
    net = nn.Linear(6, 3, bias=False).double()
    x = vectors[0][0]
    moment = x.mT @ x / 64
    moment += 1e-2 * moment.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    pruner = fishleg_ext.Pruner(net, curvature=Layerwise(1e-2), num_grads=64, progress=False)
    pruner.estimate(vectors, F.cross_entropy)
    pruner.prune_to(0.4)
    first = pruner.masks["weight"]
    weight = net.weight.detach().clone()
    pruner.estimate(vectors, F.cross_entropy)
    cost = pruner.prune_to(0.7).history[-1]["predicted_loss_increase"]
    alive = first & ~pruner.masks["weight"]
    expected = 0.0
    for row in range(3):
        free = first[row].nonzero()[:, 0]
        inverse = torch.linalg.inv(moment[free][:, free])
        expected += float(joint_cost(weight[row, free], inverse, alive[row, free]))
    assert cost == pytest.approx(expected, rel=1e-9)
    step = net.weight.detach() - weight
    assert 0.5 * float((step @ moment * step).sum()) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("scope", ["layer", {"0.weight": 0.25, "1.weight": 0.5}])
def test_fixed_order_prunes_as_many_as_asked_for(scope, vectors):
    net = deep_net()
    sparsity = 0.5 if scope == "layer" else None
    options = {"curvature": "layerwise", "saliency": "fixed_order", "scope": scope, "num_grads": 64}
    result = prune(net, vectors, sparsity=sparsity, recomputations=2, **options)
    wanted = {"0.weight": 0.5, "1.weight": 0.5} if scope == "layer" else scope
    assert result.layer_sparsity == wanted
    assert all(not p[~result.masks[n]].any() and p[result.masks[n]].all() for n, p in net.named_parameters())
    greedy = prune(deep_net(), vectors, **(options | {"saliency": "exact", "sparsity": sparsity, "recomputations": 2}))
    assert 0 < greedy.predicted_loss_increase < result.predicted_loss_increase


@pytest.mark.parametrize("saliency", ["exact", "fixed_order"])
def test_allocation_says_how_many_weights_each_layer_loses(net, data, saliency):
    other = copy.deepcopy(net)
    counts = prune(other, data, sparsity=0.6, curvature="block", damping=None).layer_sparsity
    options = {"curvature": "layerwise", "saliency": saliency}
    expected = copy.deepcopy(net)
    prune(expected, data, scope=counts, **options)
    result = prune(net, data, sparsity=0.6, allocation="block", **options)
    assert result.layer_sparsity == counts
    assert result.layer_sparsity["0.weight"] != result.layer_sparsity["4.weight"]
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), expected.parameters(), strict=True))
    assert set(result.history[0]["seconds"]) >= {"allocation", "compensation"}


def test_allocation_and_sequential_inputs_read_data_more_than_once(data):
    for options in ({"allocation": "block"}, {"curvature": Layerwise(inputs="sequential")}):
        with pytest.raises(ValueError, match="can be read again, as .*(allocation|sequential)"):
            prune(make_net(), iter(data), sparsity=0.5, **({"curvature": "layerwise"} | options))


def test_compensation_helps_where_weights_are_correlated():
    """Two equal inputs: one weight of the pair can carry both, so half the weights cost nothing."""
    torch.manual_seed(0)
    net = nn.Linear(8, 3, bias=False)
    half = torch.randn(64, 4)
    x, y = torch.cat([half, half], 1), torch.randint(0, 3, (64,))
    before = net(x)
    prune(net, [(x, y)], sparsity=0.5, num_grads=64, block_size=8, damping=1e-7)
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-2)
    magnitude = nn.Linear(8, 3, bias=False)
    before = magnitude(x)
    prune(magnitude, None, sparsity=0.5, curvature="identity")
    assert (magnitude(x) - before).abs().max() > 0.3  # it cannot


@pytest.mark.parametrize("curvature", CURVATURES)
def test_only_the_weights_change(net, data, curvature):
    net[0].eval()
    net[4].weight.requires_grad_(False)
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    before = snapshot(net)
    prune(net, data, sparsity=0.5, curvature=curvature, recomputations=2, **usable(curvature, labels="model"))
    after = snapshot(net)
    for name in prunable(net):
        before[0][name], after[0][name] = torch.zeros(()), torch.zeros(())
    assert_same(before, after)


def test_the_same_seed_gives_the_same_result_whatever_was_drawn_before(data):
    dataset = torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    results = []
    for seed in (3, 3, 4):
        net = make_net()
        torch.rand(len(results) + 1)
        loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
        prune(net, loader, sparsity=0.5, num_grads=16, seed=seed)
        results.append(net.state_dict())
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())
    assert any(not torch.equal(v, results[2][k]) for k, v in results[0].items())


def test_batchnorm_is_recalibrated_after_the_last_round(net, data):
    result = prune(net, data, sparsity=0.8, recalibrate_batchnorm=True, num_grads=16)
    x = net[0](torch.cat([x for x, _ in data]))
    torch.testing.assert_close(net[1].running_mean, x.mean((0, 2, 3)))
    assert result.sparsity == pytest.approx(0.8, abs=1e-3)


def test_tied_weights_stay_tied(data):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Flatten(),
        nn.Linear(36, 36, bias=False),
        nn.ReLU(),
        nn.Linear(36, 36, bias=False),
        nn.Linear(36, 3),
    )
    net[3].weight = net[1].weight
    result = prune(net, data, sparsity=0.5)
    assert list(result.masks) == ["1.weight", "4.weight"]
    assert net[3].weight is net[1].weight


def test_half_precision_weights_stay_so(net, data):
    net = net.bfloat16()
    prune(net, [(x.bfloat16(), y) for x, y in data], sparsity=0.5)
    assert net[4].weight.dtype == torch.bfloat16
    assert sum(int((p == 0).sum()) for p in prunable(net).values()) >= round(0.5 * num_weights(net))


def test_zeros_of_the_user_are_not_taken_for_masks(net, data):
    with torch.no_grad():
        net[4].weight[:, :5] = 0
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    assert all(m.all() for m in pruner.masks.values())


def test_recalibration_needs_data_where_there_is_batchnorm():
    without = nn.Sequential(nn.Linear(4, 4))
    assert prune(without, None, sparsity=0.5, curvature="identity", recalibrate_batchnorm=True).sparsity == 0.5
    with_norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="expected data that yields at least one sample, got none"):
        prune(with_norm, None, sparsity=0.5, curvature="identity", recalibrate_batchnorm=True)
    assert with_norm[0].weight.all()


def test_given_sparsities_are_met_to_the_last_bit():
    """1 - (1 - 0.1) is less than 0.1, which must not cost a weight."""
    net = nn.Linear(5, 3)
    assert int((~prune(net, None, scope={"weight": 0.1}, curvature="identity").masks["weight"]).sum()) == 2
