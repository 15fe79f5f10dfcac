"""Sparsity over a training run, and Pruner.step along it."""

import copy

import pytest
import torch
from oracles import batches, trained, with_estimate
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import FishLeg
from fishleg_ext.curvature.fishleg import FishLegEstimate
from fishleg_ext.pruning import first_order
from fishleg_ext.schedule import Cubic, Geometric, Linear, OneShot


@pytest.fixture
def data(generator):
    x = torch.randn(96, 8, generator=generator)
    return batches(x, (x[:, :3] + 0.3 * x[:, 3:6]).argmax(1))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def pruner_of(net, data=None, **options):
    options = {"num_grads": 96, "progress": False} | options
    return fishleg_ext.Pruner(net, data=data, **options)


def values(schedule, steps):
    return {step: schedule(step) for step in range(steps) if schedule(step) is not None}


def test_the_shapes_are_those_of_their_formulas():
    settings = {"init_sparsity": 0.2, "final_sparsity": 0.95, "start": 10, "end": 50, "frequency": 10}
    parts = [0, 0.25, 0.5, 0.75, 1]
    formulas = {
        Cubic: lambda x: 0.95 + (0.2 - 0.95) * (1 - x) ** 3,
        Linear: lambda x: 0.2 + 0.75 * x,
        Geometric: lambda x: 1 - 0.8 * (0.05 / 0.8) ** x,
    }
    for curve, formula in formulas.items():
        want = {10 + 40 * x: pytest.approx(formula(x)) for x in parts}
        assert values(curve(**settings), 100) == want
        assert curve(**settings)(50) == 0.95  # to the bit
    assert values(OneShot(final_sparsity=0.5, start=7), 100) == {7: 0.5}
    assert values(OneShot(final_sparsity=0.5), 100) == {0: 0.5}


def test_the_end_prunes_even_if_the_frequency_does_not_meet_it():
    assert list(values(Linear(final_sparsity=0.5, end=7, frequency=3), 20)) == [0, 3, 6, 7]


def test_epochs_are_steps():
    epochs = Cubic(final_sparsity=0.9, start=1, end=2.5, frequency=0.5, steps_per_epoch=20)
    steps = Cubic(final_sparsity=0.9, start=20, end=50, frequency=10)
    assert values(epochs, 100) == values(steps, 100)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"final_sparsity": 1.0}, ValueError, r"final_sparsity in \[0, 1\), got 1.0"),
        ({"init_sparsity": -0.1}, ValueError, r"init_sparsity in \[0, 1\), got -0.1"),
        ({"init_sparsity": 0.95}, ValueError, "init_sparsity <= final_sparsity, got 0.95 and 0.9"),
        ({"start": 11}, ValueError, "0 <= start <= end, got 11 and 10"),
        ({"start": -1}, ValueError, "0 <= start <= end, got -1 and 10"),
        ({"start": 0.5}, TypeError, "start to be an integer, or steps_per_epoch, got 0.5"),
        ({"end": float("inf"), "steps_per_epoch": 10}, TypeError, "end to be a number, got inf"),
        ({"frequency": 0}, ValueError, "frequency of at least one step, got 0"),
        ({"frequency": 0.01, "steps_per_epoch": 10}, ValueError, "at least one step, got 0.01"),
        ({"steps_per_epoch": 0}, ValueError, "steps_per_epoch >= 1, got 0"),
    ],
)
def test_bad_schedules(options, error, message):
    with pytest.raises(error, match=message):
        Linear(**({"final_sparsity": 0.9, "end": 10} | options))


def test_steps_prune_when_it_is_time(net, data):
    schedule = Cubic(final_sparsity=0.9, start=2, end=10, frequency=4)
    pruner = pruner_of(net, data, schedule=schedule)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    pruner.attach(optimizer)
    seen = {}
    for step in range(14):
        if pruner.step():
            seen[step] = pruner.history[-1]["sparsity"]
        for inputs, targets in data:
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), targets).backward()
            optimizer.step()
            assert not any(pruner.weights[name][~mask].any() for name, mask in pruner.masks.items())
    # At step 2 there is nothing to prune yet.
    assert seen == {6: round(schedule(6) * 176) / 176, 10: round(0.9 * 176) / 176}
    assert pruner.finalize().sparsity == round(0.9 * 176) / 176


def test_a_schedule_may_be_any_function_and_data_those_of_the_last_estimate(net, data):
    pruner = pruner_of(net, schedule={1: 0.5, 3: 0.5, 4: 0.4, 5: 0.75}.get)
    assert not pruner.step()
    with pytest.raises(ValueError, match="BlockFisher needs data, got None"):
        pruner.step()
    pruner.estimate(data)
    assert [pruner.step() for _ in range(6)] == [True, False, False, False, True, False]  # counts those that ran alone
    assert [entry["sparsity"] for entry in pruner.history] == [0.5, 0.75]
    with pytest.raises(RuntimeError, match="expected a Pruner with a schedule"):
        pruner_of(net).step()
    with pytest.raises(ValueError, match="scope=.* cannot be combined with schedule="):
        pruner_of(net, scope={"0.weight": 0.5}, schedule=OneShot(final_sparsity=0.5))


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"schedule": "cubic"}, TypeError, "schedule to be a function of the step, got 'cubic'"),
        (
            {"loss_fn": "cross_entropy"},
            TypeError,
            "loss_fn to be a function of outputs and targets or None, got 'cross_",
        ),
        ({"data": 5}, TypeError, "data to be an iterable of batches, got 5"),
        (
            {"pattern": "2:4", "schedule": Cubic(final_sparsity=0.95, end=4)},
            ValueError,
            "a sparsity of 0.5 with pattern='2:4', got 0.95",
        ),
        (
            {"min_density": 0.3, "schedule": Cubic(final_sparsity=0.95, end=4)},
            ValueError,
            "0.95 is 167 weights, but min_density=0.3 leaves only",
        ),
    ],
)
def test_what_will_fail_later_is_refused_at_once(net, options, error, message):
    with pytest.raises(error, match=message):
        fishleg_ext.Pruner(net, **options)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_masks_may_be_further_than_the_schedule(net, data, scope):
    """What is pruned already stays so, and is no error."""
    masks = {"0.weight": torch.arange(128).view(16, 8) % 5 < 2, "2.weight": torch.ones(3, 16, dtype=torch.bool)}
    with torch.no_grad():
        net[0].weight *= masks["0.weight"]
    before = int((~masks["0.weight"]).sum())
    pruner = pruner_of(net, data, masks=masks, scope=scope, schedule=Linear(final_sparsity=0.9, end=9))
    pruned = []
    for _ in range(10):
        pruner.step()
        pruned.append({name: int((~mask).sum()) for name, mask in pruner.masks.items()})
    assert pruned[0] == {"0.weight": before, "2.weight": 0}
    if scope == "layer":
        assert pruned[3] == {"0.weight": before, "2.weight": round(0.3 * 48)}
    assert sum(pruned[-1].values()) == pytest.approx(0.9 * 176, abs=1)
    assert not any(mask[~masks[name]].any() for name, mask in pruner.finalize().masks.items())
    done = pruner_of(net, data, masks=pruner.masks, scope=scope, schedule=OneShot(final_sparsity=0.2))
    assert not done.step()
    assert done.finalize().sparsity == pruner.finalize().sparsity


def test_an_early_end_is_warned_of(net, data):
    pruner = pruner_of(net, data, schedule=Cubic(final_sparsity=0.9, end=4))
    for _ in range(2):
        pruner.step()
    with pytest.warns(UserWarning, match="finalized at a sparsity of 0.52.*, the schedule ends at 0.9"):
        pruner.finalize()
    for _ in range(3):
        pruner.step()
    assert pruner.finalize().sparsity == pytest.approx(0.9, abs=0.01)


def test_a_step_that_raises_is_not_counted(net, data):
    pruner = pruner_of(net, data, schedule=OneShot(final_sparsity=0.5))
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"0.weight contains NaN"):
            pruner.step()
    with torch.no_grad():
        net[0].weight[0, 0] = 1
    assert pruner.step()


def test_other_samples_in_each_step(net, generator):
    """Shuffled data is shuffled anew, as training would, yet the same for the same seed."""
    x = torch.randn(96, 8, generator=generator)
    dataset = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    loader = torch.utils.data.DataLoader(dataset, batch_size=16, shuffle=True)
    seen = []

    class Spy(FishLegEstimate):
        def update(self, observation):
            seen[-1].append(next(iter(observation.gradients.values())).flatten(1)[0])
            super().update(observation)

    for _ in range(2):
        curvature = with_estimate(FishLeg, Spy)()
        pruner = pruner_of(
            copy.deepcopy(net), loader, schedule=lambda step: 0.1 * step, curvature=curvature, num_grads=16
        )
        for _ in range(3):
            seen.append([])
            pruner.step()
    first, second, third, again = seen[1], seen[2], seen[4], seen[5]
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[0], third[0])
    assert torch.equal(second[0], again[0])


def test_fishleg_is_refined_along_a_schedule(net, data):
    pruner = pruner_of(net, data, curvature="fishleg", schedule=lambda step: 0.2 * step, refine_grads=16)
    assert pruner.curvature.recipe.prior_weight == 2048
    assert pruner_of(net, curvature="fishleg").curvature.recipe.prior_weight == 0
    for _ in range(4):
        pruner.step()
    assert [entry["num_grads"] for entry in pruner.history] == [96, 16, 16]
    with pytest.raises(
        ValueError, match="refine_grads=.* cannot be combined with BlockFisher that starts every estimate from scratch"
    ):
        pruner_of(net, refine_grads=16)


def test_a_pattern_along_a_schedule(net, data):
    pruner = pruner_of(net, data, pattern="2:4", schedule=Linear(final_sparsity=0.5, end=4))
    shares = []
    for _ in range(5):
        pruner.step()
        groups = [mask.unflatten(1, (-1, 4)).sum(2) for mask in pruner.masks.values()]
        assert all((kept >= 2).all() for kept in groups)
        shares.append(sum(int((~mask).sum()) for mask in pruner.masks.values()) / 176)
    assert shares == [0, 0.125, 0.25, 0.375, 0.5]
    assert pruner.finalize().sparsity == 0.5
    assert all((mask.unflatten(1, (-1, 4)).sum(2) == 2).all() for mask in pruner.masks.values())


# The first-order term


@pytest.mark.parametrize("saliency", ["exact", "simultaneous"])
@pytest.mark.parametrize("before", [0.0, 0.3])
def test_the_first_order_term_is_that_of_the_formula(net, data, saliency, before):
    net, damping = net.double(), 1e-2
    data = [(x.double(), y) for x, y in data]
    dead = torch.zeros(176, dtype=torch.bool)
    settings = {"num_grads": 96, "block_size": 10**6, "damping": damping, "first_order": 1.0, "progress": False}
    pruner = fishleg_ext.Pruner(net, saliency=saliency, **settings)
    if before:
        pruner.estimate(data, F.cross_entropy)
        pruner.prune_to(before)
        dead = ~torch.cat([mask.flatten() for mask in pruner.masks.values()])
    pruner.estimate(data, F.cross_entropy)
    inverse = torch.block_diag(*(pruner.curvature.blocks(name).inverse[0] for name in pruner.weights))
    w = torch.cat([weight.detach().flatten() for weight in pruner.weights.values()])
    loss = sum(len(y) * F.cross_entropy(net(x), y) for x, y in data) / 96
    gradient = torch.autograd.grad(loss, list(pruner.weights.values()))
    g = torch.cat([part.flatten() for part in gradient]) * ~dead
    h = inverse @ g
    result = pruner.prune_to(0.6)
    gone = ~torch.cat([mask.flatten() for mask in result.masks.values()])
    moved = torch.cat([weight.detach().flatten() for weight in pruner.weights.values()])
    if saliency == "simultaneous":  # Singh and Alistarh's formulas
        score = torch.where(dead, -torch.inf, (w - h).square() / (2 * inverse.diagonal()))
        assert torch.equal(gone, ~ops_keep(score, int(gone.sum())))
        want = w - inverse @ torch.where(gone, (w - h) / inverse.diagonal(), 0) - h
        want[gone] = 0
    else:  # the minimum of g dw + dw F dw / 2 with the pruned at zero
        block = inverse[gone][:, gone]
        want = (w - h) - inverse[:, gone] @ torch.linalg.solve(block, (w - h)[gone])
        step = want - w
        fisher = torch.linalg.inv(inverse)
        increase = float(g @ step + step @ fisher @ step / 2)
        assert result.history[-1]["predicted_loss_increase"] == pytest.approx(increase, rel=1e-6)
    torch.testing.assert_close(moved, want, rtol=1e-6, atol=1e-9)


def ops_keep(score, count):
    return fishleg_ext.ops.keep_mask([score], count)[0]


@pytest.mark.parametrize("curvature", ["block", "low_rank", "kronecker", "fishleg"])
@pytest.mark.parametrize("saliency", ["exact", "simultaneous"])
def test_the_first_order_term_lowers_the_loss_of_a_model_that_is_not_at_a_minimum(net, data, curvature, saliency):
    net = trained(net, *(torch.cat(part) for part in zip(*data, strict=True)), steps=5)
    losses = {}
    for wanted in (False, True):
        copied = copy.deepcopy(net)
        options = {"num_grads": 96, "damping": 1e-2, "progress": False}
        result = fishleg_ext.prune(
            copied, data, sparsity=0.3, curvature=curvature, saliency=saliency, first_order=wanted, **options
        )
        with torch.no_grad():
            losses[wanted] = float(sum(F.cross_entropy(copied(x), y) for x, y in data))
    assert losses[True] < losses[False]
    assert 0 < result.history[0]["first_order_share"] <= 1


def test_the_first_order_term_is_taken_once(net, data):
    """A second prune_to goes on under the same quadratic model, in whose minimum the weights are by then."""
    first, second = copy.deepcopy(net), copy.deepcopy(net)
    at_once, in_two = (pruner_of(n.double(), first_order=1.0, damping=1e-2) for n in (first, second))
    double = [(x.double(), y) for x, y in data]
    for pruner in (at_once, in_two):
        pruner.estimate(double, F.cross_entropy)
    in_two.prune_to(0.2)
    at_once.prune_to(0.5)
    in_two.prune_to(0.5)
    for name, mask in at_once.masks.items():
        assert torch.equal(mask, in_two.masks[name])
        torch.testing.assert_close(at_once.weights[name], in_two.weights[name], rtol=1e-8, atol=1e-10)
    total = [sum(entry["predicted_loss_increase"] for entry in pruner.history) for pruner in (at_once, in_two)]
    assert total[0] == pytest.approx(total[1], rel=1e-8)


def test_the_step_goes_half_as_far_as_the_loss_falls(net, data):
    pruner = pruner_of(net, first_order=True, damping=1e-2)
    pruner.estimate(data, F.cross_entropy)
    first, start = pruner._first, copy.deepcopy(net.state_dict())

    def loss(share):
        there = {name: start[name] - share / first.share * first.step.get(name, 0) for name in start}
        return float(sum(F.cross_entropy(torch.func.functional_call(net, there, (x,)), y) for x, y in data))

    with torch.no_grad():
        losses = {2.0**-k: loss(2.0**-k) for k in range(16)}
    assert first.share == min(losses, key=losses.get) / 2


def test_the_first_order_term_where_there_is_none(net, data):
    for share in (2, -0.1, "whole"):
        with pytest.raises(ValueError, match="a bool or a share of the step"):
            pruner_of(net, first_order=share)
    with pytest.raises(
        ValueError, match="first_order cannot be combined with Layerwise, which knows the errors of outputs"
    ):
        pruner_of(net, curvature="layerwise", first_order=True)
    with pytest.raises(ValueError, match="first_order needs data"):
        fishleg_ext.prune(net, None, sparsity=0.5, curvature="identity", first_order=True, progress=False)
    with pytest.raises(ValueError, match="first_order= reads it twice more"):
        fishleg_ext.prune(net, iter(data), sparsity=0.5, first_order=True, num_grads=16, progress=False)


def test_data_that_is_gone_after_one_estimate_is_refused(net, data):
    schedule = Linear(final_sparsity=0.5, end=3)
    with pytest.raises(ValueError, match="each step that prunes"):
        pruner_of(net, iter(data), schedule=schedule)
    with pytest.raises(ValueError, match="each step that prunes"):
        pruner_of(net, schedule=schedule).estimate(iter(data), F.cross_entropy)


def test_every_layer_alike_along_a_schedule(data):
    net = nn.Sequential(nn.Linear(8, 5), nn.Linear(5, 1), nn.Linear(1, 3))  # counts of layers that do not add up
    pruner = pruner_of(net, data, curvature="identity", scope="layer", schedule=lambda step: 0.5)
    assert [pruner.step() for _ in range(3)] == [True, False, False]


def test_the_first_order_step_reads_as_much_as_the_estimate(net, data, monkeypatch):
    read = []
    seen = first_order.mean_gradient
    monkeypatch.setattr(first_order, "mean_gradient", lambda *a, **k: read.append(k["num_samples"]) or seen(*a, **k))
    curvature = FishLeg(carry_over=64)
    pruner = pruner_of(
        net, data, curvature=curvature, first_order=True, refine_grads=16, schedule=lambda step: 0.3 * step
    )
    for _ in range(3):
        pruner.step()
    assert read == [96, 16]


@pytest.mark.parametrize("curvature", ["kronecker", "fishleg"])
@pytest.mark.parametrize("saliency", ["exact", "simultaneous"])
def test_the_first_order_step_leaves_the_dead_where_they_are(net, data, curvature, saliency):
    pruner = pruner_of(net, data, curvature=curvature, saliency=saliency, first_order=True)
    pruner.estimate()
    pruner.prune_to(0.5)
    pruner.estimate()
    assert pruner._first.share > 0
    assert not any(pruner._first.step[name][~mask].any() for name, mask in pruner.masks.items())
