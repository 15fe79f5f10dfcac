"""n:m and blocks of weights, FLOP-weighted scope, and the least density of a layer."""

import copy
import itertools

import pytest
import torch
from oracles import batches, usable
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext import ops
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature import MODELS, BlockFisher, Layerwise
from fishleg_ext.pruning.costs import Costs
from fishleg_ext.pruning.saliency import exact_costs, simultaneous_costs
from fishleg_ext.pruning.selection import select
from fishleg_ext.sparsity.flops import flops_per_weight
from fishleg_ext.sparsity.patterns import Pattern

IN_BLOCKS = [name for name in MODELS if MODELS[name]().layout("w", torch.empty(2, 16)).block_size > 1]
WAYS = [
    *itertools.product([name for name in MODELS if name not in IN_BLOCKS], ["simultaneous"]),
    *itertools.product(IN_BLOCKS, ["exact", "simultaneous"]),
    ("layerwise", "fixed_order"),
    ("block", "fixed_order"),
]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture
def data(generator):
    x = torch.randn(48, 8, 3, 3, generator=generator)
    return batches(x, torch.randint(0, 4, (48,), generator=generator))


def prune(net, data, **options):
    models = {name: options[name] for name in ("curvature", "allocation") if name in options}
    options = usable(**models, num_grads=48, block_size=16, progress=False) | options
    if options.get("saliency") == "fixed_order":
        options["scope"] = "layer"
    return fishleg_ext.prune(net, data, **options)


def groups(tensor, size, *, channels_last=False):
    tensor = tensor.movedim(1, -1) if channels_last else tensor  # [out, *kernel, in]
    return tensor.flatten(1).unflatten(1, (-1, size))


@pytest.mark.parametrize("pattern, n, m", [("2:4", 2, 4), ("4:8", 4, 8), ("1:4", 1, 4)])
@pytest.mark.parametrize("curvature, saliency", WAYS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_n_of_each_m_are_kept(net, data, curvature, saliency, pattern, n, m, rounds):
    if rounds > 1 and (curvature, saliency) == ("layerwise", "simultaneous"):
        pytest.skip("single-weight scores of layerwise curvature are for one shot")
    options = {"scope": "layer"} if saliency == "fixed_order" else {}
    result = prune(net, data, curvature=curvature, saliency=saliency, pattern=pattern, recomputations=rounds, **options)
    assert result.sparsity == 1 - n / m
    for name, mask in result.masks.items():
        assert (groups(mask, m, channels_last=True).sum(2) == n).all()
        weight = net.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert weight[mask].all()


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("curvature, saliency", WAYS)
@pytest.mark.parametrize("rounds", [1, 3])
def test_groups_of_weights_go_together(net, data, curvature, saliency, size, rounds):
    if rounds > 1 and (curvature, saliency) == ("layerwise", "simultaneous"):
        pytest.skip("single-weight scores of layerwise curvature are for one shot")
    result = prune(
        net,
        data,
        curvature=curvature,
        saliency=saliency,
        pattern=f"block{size}",
        sparsity=0.7,
        recomputations=rounds,
    )
    total = 0
    for name, mask in result.masks.items():
        kept = groups(mask, size).sum(2)
        assert ((kept == 0) | (kept == size)).all()
        assert (net.get_parameter(name)[~mask] == 0).all()
        total += int((~mask).sum())
        if saliency == "fixed_order":
            assert int((~mask).sum()) == size * round(0.7 * mask.numel() / size)
    if curvature != "layerwise" and saliency != "fixed_order":
        assert total == size * round(0.7 * sum(mask.numel() for mask in result.masks.values()) / size)


def test_n_m_is_the_greedy_order_of_every_block(net, data):
    """The masks of the first weights that elimination under the pattern takes, and the joint compensation for them."""
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    pruner = fishleg_ext.Pruner(net, num_grads=48, block_size=16, pattern="2:4", progress=False)
    pruner.estimate(data, F.cross_entropy)
    inverse = {name: pruner.curvature.blocks(name).inverse for name in pruner.weights}
    result = pruner.prune_to()
    for name, mask in result.masks.items():
        as_blocks = lambda x: x.movedim(1, -1).reshape(-1, 16)
        rows = as_blocks(before[name])
        rank, _ = ops.obs_eliminate(rows, inverse[name], torch.ones_like(rows, dtype=torch.bool), n=2, m=4)
        assert torch.equal(as_blocks(mask), rank == 16)
        moved = ops.obs_compensate(rows, inverse[name], rank < 16)
        torch.testing.assert_close(as_blocks(net.get_parameter(name).detach()), moved)


def test_greedy_beats_the_single_weight_rule_under_a_pattern(net, data):
    greedy, single = (prune(copy.deepcopy(net), data, pattern="2:4", saliency=s) for s in ("exact", "simultaneous"))
    assert greedy.predicted_loss_increase < single.predicted_loss_increase


def test_the_order_of_groups_is_by_joint_cost(fisher, generator):
    weights = {"w": torch.randn(2, 12, dtype=torch.float64, generator=generator)}
    curvature = BlockFisher(12, 1e-3)
    curvature = curvature.start(weights)
    curvature._gram["w"] += 100 * fisher(2, 12)
    curvature._count = 100
    alive = {"w": torch.ones(2, 12, dtype=torch.bool)}
    costs = exact_costs(curvature, weights, alive, Pattern.parse("block4"))
    inverse = curvature.blocks("w").inverse
    joint = []
    for k, first in itertools.product(range(2), range(0, 12, 4)):
        part = slice(first, first + 4)
        w, h = weights["w"][k, part], inverse[k, part, part]
        joint.append((float(w @ torch.linalg.solve(h, w)) / 2, k, part))
    kept = select(costs, 4)["w"]
    _, k, part = min(joint, key=lambda entry: entry[0])
    want = torch.ones(2, 12, dtype=torch.bool)
    want[k, part] = False
    assert torch.equal(kept, want)


def test_weights_that_were_never_reached_keep_the_pattern():
    """Where elimination ends early, as variances are not positive, the pattern and the exact count still hold."""
    rows, inverse = torch.ones(1, 8), -torch.eye(8)[None]
    rank, cost = ops.obs_eliminate(rows, inverse, torch.ones(1, 8, dtype=torch.bool), n=2, m=4)
    assert (rank == 8).all()
    pattern = Pattern.parse("2:4")
    cost = cost.masked_fill(pattern.must_keep(rank.float()), torch.nan)
    mask = select({"w": Costs(BlockLayout((1, 8), 8), cost, torch.ones(1, 8, dtype=torch.bool), rank)}, 4)["w"]
    assert (groups(mask, 4).sum(2) == 2).all()


def test_a_pattern_that_does_not_fit_every_layer(data):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(5, 8), nn.Linear(8, 4))
    with pytest.warns(
        UserWarning, match=r"multiple of 4 with pattern='2:4'; these stay dense: 2.weight \(input channels 5\)"
    ):
        result = prune(net, data, curvature="identity", pattern="2:4")
    assert list(result.masks) == ["0.weight", "3.weight"]
    with pytest.raises(ValueError, match=r"multiple of 4 with pattern='2:4', got 2.weight \(input channels 5\)"):
        prune(net, data, pattern="2:4", params="re:weight")
    with pytest.raises(ValueError, match=r"multiple of 16 with pattern='block16'"):
        prune(net, data, pattern="block16", sparsity=0.5)
    with pytest.raises(ValueError, match=r"blocks of a multiple of 4 weights.*BlockFisher has blocks of 6 in 0.weight"):
        prune(net, data, pattern="2:4", block_size=6, params="0.weight")
    with pytest.raises(ValueError, match="Identity has blocks of 1"):
        prune(net, data, pattern="2:4", curvature="identity", saliency="exact", params="0.weight")


@pytest.mark.parametrize("name", ["4:2", "0:4", "2-4", "block0", "block", "2:4 ", None, 4])
def test_a_pattern_that_is_none(net, data, name):
    with pytest.raises(ValueError, match="n:m such as '2:4' or blockN such as 'block4', got"):
        prune(net, data, pattern=name, sparsity=0.5)


def test_the_sparsity_of_n_m_is_its_own(net, data):
    assert prune(net, data, pattern="1:4", sparsity=0.75).sparsity == 0.75
    with pytest.raises(ValueError, match="a sparsity of 0.5 with pattern='2:4', got 0.6"):
        prune(net, data, pattern="2:4", sparsity=0.6)
    with pytest.raises(ValueError, match="allocation cannot be combined with pattern='2:4'"):
        prune(net, data, pattern="2:4", curvature="layerwise", allocation="block")
    pruner = fishleg_ext.Pruner(net, curvature="identity", pattern="1:4", progress=False)
    pruner.estimate(None, F.cross_entropy)
    with pytest.raises(ValueError, match=r"sparsity 0.8 is \d+ weights, but pattern='1:4' leaves only \d+ to prune"):
        pruner.prune_to(0.8)
    pruner.prune_to(0.6)
    with pytest.warns(UserWarning, match="only a part of 3.weight is 1:4"):
        pruner.finalize()
    with pytest.raises(ValueError, match="masks of pattern='block4', got others of 0.weight, 3.weight"):
        fishleg_ext.Pruner(net, masks=pruner.masks, pattern="block4")
    again = fishleg_ext.Pruner(net, masks=pruner.masks, curvature="identity", pattern="1:4", progress=False)
    again.estimate()
    again.prune_to(0.75)
    assert all((groups(mask, 4, channels_last=True).sum(2) == 1).all() for mask in again.masks.values())
    other = fishleg_ext.Pruner(net, curvature="identity", progress=False)
    with pytest.raises(ValueError, match="state of pattern='unstructured', got one of '1:4'"):
        other.load_state_dict(pruner.state_dict())
    result = prune(net, data, pattern="2:4", scope={"3.weight": 0.5})
    assert result.layer_sparsity == {"0.weight": 0, "3.weight": 0.5, "5.weight": 0}


@pytest.mark.parametrize("curvature", MODELS)
@pytest.mark.parametrize("saliency", ["exact", "simultaneous"])
def test_old_zeros_stay_under_a_pattern(net, data, curvature, saliency):
    """Groups that kept more than two lose down to two, the others stay as they are."""
    if (saliency == "exact" and curvature not in IN_BLOCKS) or (curvature, saliency) == ("layerwise", "simultaneous"):
        pytest.skip("has no blocks, or no single-weight scores where weights are pruned already")
    old = prune(net, data, curvature="identity", sparsity=0.7).masks
    options = usable(curvature=curvature, num_grads=48, block_size=16, progress=False)
    with pytest.warns(UserWarning, match=r"masks keep fewer than 2 of some 4, which stay so: 0.weight \(\d+ weights\)"):
        pruner = fishleg_ext.Pruner(net, masks=old, pattern="2:4", saliency=saliency, **options)
    pruner.estimate(data, F.cross_entropy)
    result = pruner.prune_to()
    for name, mask in result.masks.items():
        assert not (mask & ~old[name]).any()
        before, after = (groups(m, 4, channels_last=True).sum(2) for m in (old[name], mask))
        assert torch.equal(after, before.clamp(max=2))
        assert not net.get_parameter(name)[~mask].any()
    assert result.sparsity > 0.7
    pruner.finalize()
    with pytest.raises(ValueError, match="take saliency='exact'"):
        fishleg_ext.Pruner(net, masks=old, pattern="2:4", curvature="block", saliency="fixed_order", scope="layer")


def test_groups_with_allocation(net, data):
    result = prune(net, data, curvature=Layerwise(), allocation="block", pattern="block4", sparsity=0.5)
    assert all((groups(mask, 4).sum(2) % 4 == 0).all() for mask in result.masks.values())
    assert result.sparsity == pytest.approx(0.5, abs=0.01)


# FLOP


def test_uses_of_weights_are_the_outputs_that_they_reach(data):
    shared = nn.Linear(6, 6)
    conv, up = nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), nn.ConvTranspose1d(6, 6, 2, stride=2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.up, self.shared = conv, up, shared

        def forward(self, x):
            x = self.up(self.conv(x[:, :4].flatten(2)[..., :8])).mT  # [N, 8, 6]
            return self.shared(self.shared(x))[:, 0]

    names = {"conv.weight": conv.weight, "up.weight": up.weight, "shared.weight": shared.weight}
    assert flops_per_weight(Net(), data, names) == {"conv.weight": 4, "up.weight": 4, "shared.weight": 16}


@pytest.mark.parametrize("saliency", ["exact", "simultaneous"])
def test_flops_count_the_cost_over_how_often_a_weight_is_used(net, data, saliency):
    pruner = fishleg_ext.Pruner(net, num_grads=48, block_size=16, scope="flops", saliency=saliency, progress=False)
    pruner.estimate(data, F.cross_entropy)
    weights = {name: weight.detach() for name, weight in pruner.weights.items()}
    costs = {"exact": exact_costs, "simultaneous": simultaneous_costs}[saliency](
        pruner.curvature, weights, pruner.masks
    )
    dearer = {n: Costs(c.layout, c.cost / (4 if n == "0.weight" else 1), c.alive, c.rank) for n, c in costs.items()}
    expected = select(dearer, round(0.6 * 832))
    result = pruner.prune_to(0.6)
    assert all(torch.equal(result.masks[n], expected[n]) for n in expected)
    assert sum(int((~m).sum()) for m in result.masks.values()) == round(0.6 * 832)


def test_flops_of_what_is_no_layer_or_has_no_data(net, data):
    with pytest.raises(ValueError, match="scope='flops' needs data"):
        prune(net, None, curvature="identity", scope="flops", sparsity=0.5)
    with pytest.raises(ValueError, match=r"weights that inputs are multiplied by, 0.bias is none"):
        prune(net, data, params=["0.bias", "0.weight"], scope="flops", sparsity=0.5)
    with pytest.raises(ValueError, match="scope='flops' reads it once more"):
        prune(net, iter(data), scope="flops", sparsity=0.5)


# least density


@pytest.mark.parametrize("curvature", ["identity", "block"])
def test_no_parameter_loses_more_than_it_may(net, data, curvature):
    with torch.no_grad():
        net[0].weight.mul_(1e-3)  # magnitude would lose all of it
    result = prune(net, data, curvature=curvature, sparsity=0.8, min_density=0.1)
    assert sum(int((~m).sum()) for m in result.masks.values()) == round(0.8 * 832)
    for mask in result.masks.values():
        assert int(mask.sum()) >= 0.1 * mask.numel()
    if curvature == "identity":
        assert int(result.masks["0.weight"].sum()) == 26  # of 256
    with pytest.raises(ValueError, match=r"sparsity 0.95 is 790 weights, but min_density=0.1 leaves only \d+ to prune"):
        prune(net, data, curvature=curvature, sparsity=0.95, min_density=0.1)
    with pytest.raises(ValueError, match=r"min_density in \[0, 1\), got 1"):
        prune(net, data, sparsity=0.5, min_density=1)


def test_what_a_parameter_keeps_at_least_is_what_it_would_lose_last(generator):
    layouts = {name: BlockLayout((4, 5), 8) for name in "ab"}
    alive = {name: layout.is_weight(torch.device("cpu")) for name, layout in layouts.items()}
    cost = {name: torch.rand(3, 8, generator=generator) * (0.01 if name == "a" else 1) for name in "ab"}
    costs = {name: Costs(layouts[name], cost[name], alive[name]) for name in "ab"}
    masks = select(costs, 25, max_counts={"a": 15, "b": 20})
    assert int((~masks["a"]).sum()) == 15
    assert int((~masks["b"]).sum()) == 10
    a = layouts["a"].from_blocks(cost["a"])
    assert a[~masks["a"]].max() <= a[masks["a"]].min()


def test_the_least_density_is_exact():
    net = nn.Sequential(nn.Linear(50, 20))
    assert prune(net, None, curvature="identity", sparsity=0.2, min_density=0.8).sparsity == 0.2
    with pytest.raises(ValueError, match="pattern='2:4' with min_density=0.6 leaves only"):
        prune(nn.Linear(16, 16), None, curvature="identity", pattern="2:4", min_density=0.6)


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.97])
def test_groups_in_a_last_block_that_is_not_full(sparsity, generator):
    """192 weights in blocks of 128: padding is none of them."""
    x = torch.randn(64, 16, generator=generator)
    net = nn.Linear(16, 12)
    result = prune(net, batches(x, x[:, :12].argmax(1)), pattern="block4", sparsity=sparsity, block_size=128)
    assert int((~result.masks["weight"]).sum()) == 4 * round(sparsity * 48)
    assert (groups(result.masks["weight"], 4).sum(2) % 4 == 0).all()


def test_flops_are_counted_once_and_saved(net, data):
    options = {"num_grads": 48, "block_size": 16, "scope": "flops", "progress": False}
    pruner = fishleg_ext.Pruner(net, **options)
    pruner.estimate(data, F.cross_entropy)
    again = fishleg_ext.Pruner(copy.deepcopy(net), **options)
    again.load_state_dict(pruner.state_dict())
    assert pruner.prune_to(0.6).layer_sparsity == again.prune_to(0.6).layer_sparsity
