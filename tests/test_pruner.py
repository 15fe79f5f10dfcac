"""prune and Pruner, end to end on small networks."""

import copy
import gc
import inspect
import json
import re
import sys
import weakref

import pytest
import torch
from oracles import batches, joint_cost, usable, with_estimate
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import BlockFisher, CurvatureError, Layerwise
from fishleg_ext.curvature.block import BlockEstimate
from fishleg_ext.curvature.layerwise import LayerwiseEstimate
from fishleg_ext.observation.observe import observe

CURVATURES = ["identity", "diagonal", "block", "low_rank", "layerwise"]
SALIENCIES = ["exact", "simultaneous"]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, 10),
        nn.ReLU(),
        nn.Linear(10, 3),
    )


@pytest.fixture
def net():
    return make_net()


@pytest.fixture
def data(generator):
    x = torch.randn(48, 1, 6, 6, generator=generator)
    return batches(x, torch.randint(0, 3, (48,), generator=generator))


def prune(net, data, *loss_fn, **options):
    models = {name: options[name] for name in ("curvature", "allocation") if name in options}
    defaults = usable(**models, num_grads=32, block_size=16, damping=1e-3, progress=False)
    return fishleg_ext.prune(net, data, *loss_fn, **(defaults | options))


def prunable(net):
    return {n: p for n, p in net.named_parameters() if p.dim() > 1}


def num_weights(net):
    return sum(p.numel() for p in prunable(net).values())


# the contract


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
    ]
    pruner = inspect.signature(fishleg_ext.Pruner).parameters
    over_time = {"config", "schedule", "data", "refine_grads", "masks"}
    assert list(pruner)[:2] == ["model", "config"]
    assert set(pruner) == set(parameters) - {"sparsity", "recomputations"} | over_time
    assert all(pruner[n].default == parameters[n].default for n in set(pruner) - over_time - {"data"})
    assert all(pruner[n].default is None for n in over_time)
    assert parameters["loss_fn"].default is F.cross_entropy


@pytest.mark.parametrize("curvature", CURVATURES)
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


@pytest.mark.parametrize("curvature", CURVATURES)
def test_scope_layer_counts_in_each(net, data, curvature):
    result = prune(net, data, sparsity=0.63, curvature=curvature, scope="layer")
    for name, weight in prunable(net).items():
        assert int((~result.masks[name]).sum()) == round(0.63 * weight.numel())


def test_scope_of_given_sparsities(net, data):
    result = prune(net, data, scope={"4.weight": 0.8, "0.weight": 0.25}, recomputations=2)
    assert int((~result.masks["4.weight"]).sum()) == round(0.8 * 640)
    assert int((~result.masks["0.weight"]).sum()) == 9
    assert result.masks["6.weight"].all()


@pytest.mark.parametrize("curvature", CURVATURES)
def test_predicted_loss_increase_is_the_joint_cost_of_the_masks(curvature, data):
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
        gone = ~result.masks["weight"].flatten()
        expected = joint_cost(weight.flatten(), torch.linalg.inv(fisher.double()), gone)
        assert result.predicted_loss_increase == pytest.approx(float(expected), rel=1e-6)
        if saliency == "exact":  # the weights moved are those of the best step
            step = (again.weight.detach() - weight).flatten()
            assert 0.5 * float(step @ fisher.double() @ step) == pytest.approx(float(expected), rel=1e-6)


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


def test_a_state_with_an_allocation_is_for_a_pruner_that_has_one(data):
    options = {"curvature": "layerwise", "num_grads": 16, "progress": False}
    pruner = fishleg_ext.Pruner(make_net(), allocation="block", **options)
    with pytest.raises(ValueError, match="with the same allocation"):
        fishleg_ext.Pruner(make_net(), **options).load_state_dict(pruner.state_dict())


def test_allocation_in_parts_is_the_same_and_serves_one_prune_to(data):
    options = {"curvature": "layerwise", "allocation": "block", "num_grads": 16, "block_size": 16, "progress": False}
    free, tight = make_net(), make_net()
    expected = fishleg_ext.prune(free, data, sparsity=0.6, **options)
    pruner = fishleg_ext.Pruner(tight, max_memory=2 * 131_000, **options)
    assert len(pruner.allocator.groups) > 1
    pruner.estimate(data, F.cross_entropy)
    got = pruner.prune_to(0.6)
    assert all(torch.equal(mask, got.masks[name]) for name, mask in expected.masks.items())
    with pytest.raises(RuntimeError, match="before each prune_to"):
        pruner.prune_to(0.7)


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


# what is left alone


def snapshot(net):
    return (
        copy.deepcopy(net.state_dict()),
        [m.training for m in net.modules()],
        [p.requires_grad for p in net.parameters()],
        [None if p.grad is None else p.grad.clone() for p in net.parameters()],
        torch.get_rng_state(),
    )


def assert_same(before, after):
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:3] == after[1:3]
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(before[3], after[3], strict=True))
    assert torch.equal(before[4], after[4])


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


def failing():
    """A recipe whose estimates break in the middle of the second round."""
    calls = []

    class FailingEstimate(BlockEstimate):
        def blocks(self, name):
            if name == "6.weight":
                calls.append(name)
                if len(calls) == 4:
                    raise KeyboardInterrupt
            return super().blocks(name)

    return with_estimate(BlockFisher, FailingEstimate)(16, 1e-3)


def test_an_exception_leaves_the_model_as_it_was(net, data):
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        prune(
            net,
            data,
            sparsity=0.8,
            curvature=failing(),
            recomputations=3,
            recalibrate_batchnorm=True,
        )
    assert_same(before, snapshot(net))


def test_a_failed_prune_to_leaves_weights_and_masks(net, data):
    pruner = fishleg_ext.Pruner(net, curvature=failing(), num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.3)
    before, masks = snapshot(net), pruner.masks
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_to(0.6)
    assert_same(before, snapshot(net))
    assert all(torch.equal(m, masks[n]) for n, m in pruner.masks.items())
    assert len(pruner.history) == 1


# rounds


def test_rounds_fall_geometrically_and_masks_only_grow(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, damping=1e-3, progress=False)
    masks = pruner.masks
    for done in range(1, 4):
        pruner.estimate(data, F.cross_entropy)
        result = pruner.prune_to(1 - 0.1 ** (done / 3))
        for name, mask in result.masks.items():
            assert not (mask & ~masks[name]).any()
        masks = result.masks
    again = make_net()
    whole = prune(again, data, sparsity=0.9, num_grads=16, recomputations=3)
    assert [h["sparsity"] for h in whole.history] == [h["sparsity"] for h in result.history]
    assert all(torch.equal(m, masks[n]) for n, m in whole.masks.items())
    assert whole.predicted_loss_increase == pytest.approx(sum(h["predicted_loss_increase"] for h in whole.history))


def test_going_on_under_one_estimate_equals_one_step(data):
    """Greedy elimination to 50 % and on to 80 % is greedy elimination to 80 %."""
    once, twice = make_net().double(), make_net().double()
    data = [(x.double(), y) for x, y in data]
    options = {"num_grads": 32, "block_size": 16, "damping": 1e-3, "progress": False}
    whole = fishleg_ext.prune(once, data, sparsity=0.8, scope="layer", **options)
    pruner = fishleg_ext.Pruner(twice, scope="layer", **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    result = pruner.prune_to(0.8)
    for name, mask in whole.masks.items():
        assert torch.equal(mask, result.masks[name])
        torch.testing.assert_close(once.state_dict()[name], twice.state_dict()[name])
    assert result.predicted_loss_increase == pytest.approx(whole.predicted_loss_increase, rel=1e-6)


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


@pytest.mark.parametrize("curvature", ["diagonal", "block"])
@pytest.mark.parametrize("saliency", SALIENCIES)
def test_max_memory_changes_passes_not_results(data, curvature, saliency):
    dataset = torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    options = {
        "sparsity": 0.7,
        "curvature": curvature,
        "saliency": saliency,
        "recomputations": 2,
        "labels": "model",
    }
    free, tight = make_net(), make_net()
    budget = {"diagonal": 15_400, "block": 131_000}[curvature]  # just enough for the largest layer
    expected = prune(free, loader, **options)
    got = prune(tight, loader, max_memory=budget, **options)
    pruner = fishleg_ext.Pruner(make_net(), curvature=curvature, max_memory=budget, **usable(curvature, block_size=16))
    assert len(pruner.estimator.groups) > 1
    for name, mask in expected.masks.items():
        assert torch.equal(mask, got.masks[name])
        torch.testing.assert_close(tight.state_dict()[name], free.state_dict()[name])
    assert got.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase)


def test_max_memory_that_holds_not_even_one_layer_is_refused(net, data):
    with pytest.raises(
        ValueError, match=r"max_memory=1000 is too small for BlockFisher: 4.weight needs at least \d+ bytes"
    ):
        prune(net, data, sparsity=0.5, max_memory=1000)
    with pytest.raises(ValueError, match="LowRankFisher: all parameters together need"):
        prune(net, data, sparsity=0.5, curvature="low_rank", max_memory=50_000)


def test_max_memory_beside_an_allocation_is_what_both_need(net, data):
    """Whoever gives what each error asks for gets there, and not before the error says so."""
    options = {"curvature": "layerwise", "allocation": "block", "num_grads": 16, "progress": False}
    needed = [1000]
    while len(needed) < 4:  # one error for each of the two at most
        try:
            result = prune(net, data, sparsity=0.5, max_memory=needed[-1], **options)
            break
        except ValueError as error:
            asked = re.search(r"needs at least (\d+) bytes, half of them for allocation=", str(error))
            needed.append(int(asked[1]))
    assert 1 < len(needed) < 4
    assert needed == sorted(set(needed))
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)


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


# Pruner


def test_apply_masks_after_training(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        pruner.apply_masks()
    result = pruner.finalize()
    for name, weight in prunable(net).items():
        assert not weight[~result.masks[name]].any()
        assert weight[result.masks[name]].any()


def test_state_survives(net, data, tmp_path):
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    again = fishleg_ext.Pruner(make_net(), num_grads=16, block_size=16, progress=False)
    again.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    assert all(torch.equal(m, again.masks[n]) for n, m in pruner.masks.items())
    assert again.history == pruner.history
    torch.testing.assert_close(again.curvature.diag(), pruner.curvature.diag())
    with pytest.raises(
        ValueError,
        match="state of a Pruner with 'pattern'",
    ):
        again.load_state_dict({})
    other = fishleg_ext.Pruner(make_net(), curvature="layerwise", progress=False)
    with pytest.raises(ValueError, match="expected the state of Layerwise, got that of BlockFisher"):
        other.load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("options", [{}, {"curvature": "layerwise", "allocation": "block"}, {"max_memory": 131_000}])
def test_a_pruner_that_is_let_go_is_gone(data, options):
    """With all its curvature, at once: no cycle keeps it until the garbage is collected."""
    torch.func.vmap(torch.func.grad(torch.sin))(torch.ones(1))  # the first keeps the frames that it was called from
    net = make_net()
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, progress=False, **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    left = [weakref.ref(each) for each in (pruner, pruner.curvature, net)]
    gc.disable()
    try:
        del pruner, net
        assert [each() for each in left] == [None] * 3
    finally:
        gc.enable()


def test_order_of_calls_is_explained(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    with pytest.raises(RuntimeError, match="call estimate"):
        pruner.prune_to(0.5)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    with pytest.raises(ValueError, match=r"sparsity 0.4 is \d+ weights, but \d+ are pruned already"):
        pruner.prune_to(0.4)
    with pytest.raises(ValueError, match=r"expected a sparsity in \[0, 1\), got None"):
        pruner.prune_to()


def test_recalibration_needs_data_where_there_is_batchnorm():
    without = nn.Sequential(nn.Linear(4, 4))
    assert prune(without, None, sparsity=0.5, curvature="identity", recalibrate_batchnorm=True).sparsity == 0.5
    with_norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(ValueError, match="expected data that yields at least one sample, got none"):
        prune(with_norm, None, sparsity=0.5, curvature="identity", recalibrate_batchnorm=True)
    assert with_norm[0].weight.all()


# bad input


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "expected a sparsity"),
        ({"sparsity": 1.0}, ValueError, r"sparsity in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, "got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "got nan"),
        ({"sparsity": "0.5"}, TypeError, "got '0.5'"),
        ({"sparsity": 0.5, "curvature": "full"}, ValueError, "got 'full'"),
        ({"sparsity": 0.5, "saliency": "greedy"}, ValueError, "got 'greedy'"),
        ({"sparsity": 0.5, "scope": "row"}, ValueError, "got 'row'"),
        (
            {"sparsity": 0.5, "scope": "global", "allocation": "block"},
            ValueError,
            "allocation cannot be .* scope='global'",
        ),
        ({"sparsity": 0.5, "allocation": "blocks"}, ValueError, "got 'blocks'"),
        (
            {"sparsity": 0.5, "allocation": Layerwise(inputs="sequential")},
            ValueError,
            "of sequential inputs",
        ),
        (
            {"sparsity": 0.5, "curvature": "layerwise", "saliency": "simultaneous", "recomputations": 2},
            ValueError,
            "single-weight scores of Layerwise would count on these",
        ),
        (
            {"sparsity": 0.5, "saliency": "fixed_order"},
            ValueError,
            "fixed_order' cannot .* scope='layer'",
        ),
        ({"sparsity": 0.5, "curvature": "layerwise", "damping": 0.0}, ValueError, "damping"),
        ({"sparsity": 0.5, "scope": {"0.weight": 0.5}}, ValueError, "sparsity= cannot be combined with scope="),
        ({"scope": {"0.wait": 0.5}}, ValueError, "0.wait not among"),
        ({"scope": {"0.weight": 1.5}}, ValueError, "sparsity of 0.weight"),
        ({"sparsity": 0.5, "pattern": "4:2"}, ValueError, "got '4:2'"),
        ({"sparsity": 0.5, "params": "nope"}, ValueError, "no parameter matches 'nope'"),
        ({"sparsity": 0.5, "num_grads": 0}, ValueError, "num_grads"),
        ({"sparsity": 0.5, "grad_batch_size": 1.5}, TypeError, "grad_batch_size"),
        ({"sparsity": 0.5, "max_memory": 2e8}, TypeError, "max_memory to be an integer"),
        ({"sparsity": 0.5, "block_size": 2.5}, TypeError, "block_size to be an integer"),
        ({"sparsity": 0.5, "curvature": "identity", "damping": -1.0}, ValueError, "damping"),
        ({"sparsity": 0.5, "likelihood": "poisson"}, ValueError, "got 'poisson'"),
        ({"scope": {0: 0.5}}, ValueError, "0 not among"),
        ({"sparsity": 0.5, "pattern": None}, ValueError, "got None"),
        ({"sparsity": 0.5, "pattern": "0:0"}, ValueError, "got '0:0'"),
        ({"sparsity": 0.5, "recomputations": 0}, ValueError, "recomputations"),
        ({"sparsity": 0.5, "block_size": 0}, ValueError, "block_size"),
        ({"sparsity": 0.5, "damping": -1.0}, ValueError, "damping"),
        ({"sparsity": 0.5, "labels": "true"}, ValueError, "got 'true'"),
        ({"sparsity": 0.5, "impl": "fast"}, ValueError, "got 'fast'"),
        ({"sparsity": 0.5, "impl": "cuda"}, NotImplementedError, "impl='cuda'"),
    ],
)
def test_bad_arguments_are_explained_and_change_nothing(net, data, options, error, message):
    before = snapshot(net)
    with pytest.raises(error, match=message):
        prune(net, data, **options)
    assert_same(before, snapshot(net))


def test_bad_data_is_explained_and_changes_nothing(net, data):
    before = snapshot(net)
    with pytest.raises(ValueError, match="at least one sample"):
        prune(net, [], sparsity=0.5)
    with pytest.raises(ValueError, match="needs data, .*got None"):
        prune(net, None, sparsity=0.5)
    with pytest.raises(TypeError, match="data to be an iterable of batches, got 5"):
        prune(net, 5, sparsity=0.5)
    with pytest.raises(TypeError, match="loss_fn to be a function of outputs and targets, got 0.5"):
        prune(net, data, 0.5, sparsity=0.5)
    with pytest.raises(TypeError, match="model to be an nn.Module, got 'net'"):
        prune("net", data, sparsity=0.5)
    with pytest.raises(ValueError, match=r"recomputations=2, got a one-shot list_iterator"):
        prune(net, iter(data), sparsity=0.5, recomputations=2)
    with pytest.raises(ValueError, match="max_memory splits"):
        prune(net, iter(data), sparsity=0.5, max_memory=131_000)
    poisoned = [(x * torch.inf, y) for x, y in data]
    with pytest.raises(ValueError, match=r"gradients of 0.weight.* contain NaN or inf"):
        prune(net, poisoned, sparsity=0.5)
    with pytest.raises(ValueError, match="likelihood="):
        prune(net, data, loss_fn=F.mse_loss, sparsity=0.5, labels="model")
    assert_same(before, snapshot(net))
    prune(net, iter(data), sparsity=0.5)


def test_bad_weights_are_named(net, data):
    with torch.no_grad():
        net[6].weight[0, 0] = torch.inf
    before = snapshot(net)
    with pytest.raises(ValueError, match="6.weight contains NaN or inf"):
        prune(net, data, sparsity=0.5)
    assert_same(before, snapshot(net))


class SingularEstimate(BlockEstimate):
    """A Gram matrix that no damping mends."""

    def update(self, observation):
        super().update(observation)
        self._gram["4.weight"][0].fill_(torch.nan)


def test_a_block_that_cannot_be_inverted_is_named(net, data):
    before = snapshot(net)
    with pytest.raises(CurvatureError, match=r"4.weight: 1 of 40 Fisher blocks cannot be inverted"):
        prune(net, data, sparsity=0.5, curvature=with_estimate(BlockFisher, SingularEstimate)(16, 1e-3))
    assert_same(before, snapshot(net))


def test_raised_damping_is_in_the_history(net, data):
    with pytest.warns(UserWarning, match="not positive definite with damping 1e-12"):
        result = prune(net, data, sparsity=0.5, damping=1e-12, num_grads=4)
    assert result.history[0]["damping_raised"]["4.weight"] > 0
    assert result.history[0]["num_grads"] == 4


def test_short_data_warns_and_is_used(net, data):
    with pytest.warns(UserWarning, match="after 48 of num_grads=1024"):
        result = prune(net, data, sparsity=0.5, num_grads=None)
    assert result.history[0]["num_grads"] == 48


def test_progress_is_drawn_on_a_terminal_only(net, data, capfd, monkeypatch):
    prune(net, data, sparsity=0.5, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    prune(make_net(), data, sparsity=0.5, progress=True)
    drawn = capfd.readouterr().err
    assert all(stage in drawn for stage in ("gradients", "elimination", "compensation"))
    prune(make_net(), data, sparsity=0.5, progress=False)
    assert capfd.readouterr().err == ""


# every argument reaches its stage


class Spy(BlockEstimate):
    """Keeps its gradients."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def update(self, observation):
        super().update(observation)
        self.seen.append({name: grads.clone() for name, grads in observation.gradients.items()})

    def gradients(self, name):
        return torch.cat([chunk[name] for chunk in self.seen])


SPYING = with_estimate(BlockFisher, Spy)(16, 1e-3)


def test_gradients_of_the_pruned_are_masked_in_later_rounds(net, data):
    pruner = fishleg_ext.Pruner(net, curvature=SPYING, num_grads=16, progress=False)
    for sparsity in (0.5, 0.8):
        masks = pruner.masks
        pruner.estimate(data, F.cross_entropy)
        for name, mask in masks.items():
            assert not pruner.curvature.gradients(name)[:, ~mask].any()
            assert pruner.curvature.gradients(name)[:, mask].any()
        pruner.prune_to(sparsity)


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "model"},
        {"labels": "model", "likelihood": lambda outputs, generator: outputs.argmax(1)},
        {"grad_batch_size": 3},
        {"seed": 5, "labels": "model"},
    ],
)
def test_what_is_observed_is_what_was_asked_for(net, data, options):
    pruner = fishleg_ext.Pruner(net, curvature=SPYING, num_grads=12, progress=False, **options)
    pruner.estimate(data, F.cross_entropy)
    spy, weights = pruner.curvature, prunable(net)
    recorder = SPYING.start(weights)
    observe(net, data, F.cross_entropy, recorder, weights, num_grads=12, **options)
    plain = SPYING.start(weights)
    observe(net, data, F.cross_entropy, plain, weights, num_grads=12)
    for name in weights:
        assert torch.equal(spy.gradients(name), recorder.gradients(name))
    assert not torch.equal(plain.gradients("4.weight"), spy.gradients("4.weight"))


def test_max_memory_bounds_the_chunks(net, data):
    pruner = fishleg_ext.Pruner(net, curvature=SPYING, num_grads=16, max_memory=150_000, progress=False)
    pruner.estimate(data, F.cross_entropy)
    assert max(len(chunk["4.weight"]) for chunk in pruner.curvature.seen) == (150_000 - 128_000) // (3 * 4 * 706)


def test_impl_governs_every_stage(net, data):
    with pytest.raises(NotImplementedError, match="block_gram_: impl='cuda'"):
        fishleg_ext.Pruner(net, impl="cuda", num_grads=8, progress=False).estimate(data, F.cross_entropy)
    pruner = fishleg_ext.Pruner(net, impl="triton", curvature="identity", progress=False)
    pruner.estimate(None, F.cross_entropy)
    with pytest.raises(NotImplementedError, match="obs_score: impl='triton'"):
        pruner.prune_to(0.5)
    with pytest.raises(NotImplementedError, match="impl='triton'"):
        pruner.apply_masks()


def test_use_impl_reaches_the_ops_of_prune(net, data):
    with fishleg_ext.use_impl("cuda"):
        with pytest.raises(NotImplementedError, match="impl='cuda'"):
            prune(net, data, sparsity=0.5)
        prune(net, data, sparsity=0.5, impl="reference")


# one estimate, several uses


def loader_of(data, **options):
    dataset = torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    return torch.utils.data.DataLoader(dataset, batch_size=8, **options)


@pytest.mark.parametrize(
    "options", [{}, {"recomputations": 2}, {"recalibrate_batchnorm": True}, {"max_memory": 131_000}]
)
def test_a_data_loader_leaves_the_rng_alone(net, data, options):
    state = torch.get_rng_state()
    prune(net, loader_of(data, shuffle=True), sparsity=0.5, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_given_sparsities_are_met_to_the_last_bit():
    """1 - (1 - 0.1) is less than 0.1, which must not cost a weight."""
    net = nn.Linear(5, 3)
    assert int((~prune(net, None, scope={"weight": 0.1}, curvature="identity").masks["weight"]).sum()) == 2


def test_a_split_estimate_serves_one_prune_to(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, max_memory=131_000, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.4)
    with pytest.raises(RuntimeError, match="before each prune_to"):
        pruner.prune_to(0.6)
    pruner.estimate(data, F.cross_entropy)
    assert pruner.prune_to(0.6).sparsity == pytest.approx(0.6, abs=1e-3)


def test_sampled_gaussian_labels_do_not_depend_on_max_memory(generator):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 20)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = [(torch.randn(64, 6, generator=generator), torch.randn(64, 20, generator=generator))]
    options = {"sparsity": 0.5, "curvature": "diagonal", "labels": "model", "likelihood": "gaussian", "num_grads": 64}
    free = prune(nets[0], data, F.mse_loss, max_memory=10**6, **options)
    tight = prune(nets[1], data, F.mse_loss, max_memory=6 * 2400 + 10 * 2400 * 3, **options)
    assert all(torch.equal(mask, tight.masks[name]) for name, mask in free.masks.items())


def test_raised_damping_of_every_part_is_reported(data):
    options = {"damping": 1e-12, "num_grads": 4, "sparsity": 0.5}
    with pytest.warns(UserWarning, match="not positive definite"):
        whole = prune(make_net(), data, **options)
    with pytest.warns(UserWarning, match="not positive definite"):
        split = prune(make_net(), data, max_memory=131_000, **options)
    assert whole.history[0]["damping_raised"] == split.history[0]["damping_raised"]
    assert len(whole.history[0]["damping_raised"]) > 1


def test_the_identity_needs_no_memory(net):
    prune(net, None, sparsity=0.5, curvature="identity", max_memory=1)


def test_an_estimate_that_failed_is_not_used(net, data):
    calls = []

    def fails_once(outputs, targets):
        calls.append(1)
        if len(calls) < 3:  # vmap, then the loop
            raise ZeroDivisionError
        return F.cross_entropy(outputs, targets)

    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    with pytest.raises(ZeroDivisionError):
        pruner.estimate(iter(data), fails_once)
    with pytest.raises(RuntimeError, match="call estimate"):
        pruner.prune_to(0.5)


def test_replaced_parameters_are_noticed(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="0.weight was replaced"):
        pruner.estimate(data, F.cross_entropy)


def test_weights_that_went_bad_after_the_estimate_are_named(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    with torch.no_grad():
        net[4].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="4.weight contains NaN"):
        pruner.prune_to(0.5)


def test_an_interrupt_while_weights_are_written_restores_them(net, data, monkeypatch):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    before = snapshot(net)

    def interrupt(masks):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruner._masks, "set", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_to(0.5)
    assert_same(before, snapshot(net))


def test_masks_handed_out_are_copies(net):
    pruner = fishleg_ext.Pruner(net, progress=False)
    pruner.masks["4.weight"].fill_(False)
    assert pruner.masks["4.weight"].all()


@pytest.mark.parametrize("models", [{}, {"curvature": "layerwise"}, {"curvature": "layerwise", "allocation": "block"}])
def test_pruning_goes_on_from_a_saved_estimate(models, data, tmp_path):
    once, twice = make_net(), make_net()
    options = models | usable(**models, num_grads=16, block_size=16, progress=False)
    pruner = fishleg_ext.Pruner(once, **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    torch.save({"pruner": pruner.state_dict(), "model": once.state_dict()}, tmp_path / "state.pt")
    expected = pruner.prune_to(0.8)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(saved["pruner"]["history"]) == 1
    twice.load_state_dict(saved["model"])
    again = fishleg_ext.Pruner(twice, **options)
    again.load_state_dict(saved["pruner"])
    got = again.prune_to(0.8)
    assert got.history[-1]["num_grads"] == 16
    assert all(torch.equal(mask, got.masks[name]) for name, mask in expected.masks.items())
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())


@pytest.mark.parametrize(
    "other", [{"curvature": BlockFisher(32)}, {"curvature": "diagonal"}, {"curvature": "low_rank"}]
)
def test_a_state_of_other_arguments_changes_nothing(data, other):
    options = {"num_grads": 16, "block_size": 16, "progress": False}
    pruner = fishleg_ext.Pruner(make_net(), **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    net = make_net()
    again = fishleg_ext.Pruner(net, **other, **usable(**other, num_grads=16, block_size=16, progress=False))
    again.estimate(data, F.cross_entropy)
    with pytest.raises(ValueError, match="expected"):
        again.load_state_dict(pruner.state_dict())
    assert all(mask.all() for mask in again.masks.values())
    assert again.prune_to(0.5).sparsity == 0.5
