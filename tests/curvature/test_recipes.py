"""Recipes are settings alone; what was observed is in estimates, which two pruners do not share."""

import copy
import dataclasses
import pickle

import pytest
import torch
from oracles import batches, rows_of, trained
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import (
    MODELS,
    Adam,
    BlockFisher,
    CurvatureError,
    FishLeg,
    Kronecker,
    Layerwise,
    make_curvature,
)
from fishleg_ext.observation.types import Observation, ProductRows

RECIPES = [
    *(model() for model in MODELS.values()),
    BlockFisher(32, 1e-3, num_grads=16, labels="model"),
    FishLeg(structure={"0.weight": "block", "2.weight": "diagonal"}, adam=Adam(steps=5)),
    Kronecker(factors="gradients", structure="kronecker"),
    Layerwise(inputs="sequential"),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=repr)
def test_recipes_are_compared_by_value_hashable_and_frozen(recipe):
    again = type(recipe)(**{f.name: getattr(recipe, f.name) for f in dataclasses.fields(recipe)})
    for other in (again, copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe))):
        assert other == recipe
        assert hash(other) == hash(recipe)
    assert len({*RECIPES, again}) == len(RECIPES)
    for name in ("num_grads", "damping", "biases", "progress"):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(recipe, name, 1)
    assert str(getattr(recipe, "damping", "")) in repr(recipe)


def test_a_monitor_is_no_part_of_what_is_compared():
    assert FishLeg(monitor=print) == FishLeg()
    assert FishLeg(structure={"a": "block"}) != FishLeg(structure={"a": "rows"})
    assert FishLeg() != BlockFisher()


@pytest.mark.parametrize("wrong", [{"num_grads": 0}, {"labels": "true"}, {"likelihood": "poisson"}, {"damping": -1.0}])
def test_settings_of_a_recipe_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        BlockFisher(**wrong)


def two_networks(generator):
    """Networks of layers of one shape, whose estimates could be mistaken for each other's, and their data."""
    torch.manual_seed(0)
    data = [(torch.randn(96, 12, generator=generator), torch.randint(4, (96,), generator=generator)) for _ in range(2)]
    nets = [nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 4)) for _ in range(2)]
    return [(trained(net, x, y, steps=20), batches(x, y)) for net, (x, y) in zip(nets, data, strict=True)]


SHARED = [BlockFisher(8, 1e-3), FishLeg(), FishLeg(carry_over=64), Kronecker(), make_curvature("low_rank"), Layerwise()]


@pytest.mark.parametrize("recipe", SHARED, ids=repr)
@pytest.mark.parametrize("interleaved", [False, True])
def test_two_pruners_of_one_instance_are_as_two_with_their_own(recipe, interleaved, generator):
    problems = two_networks(generator)

    def masks_and_weights(instances):
        nets = [copy.deepcopy(net) for net, _ in problems]
        pruners = [
            Pruner(net, curvature=instance, num_grads=64, progress=False)
            for net, instance in zip(nets, instances, strict=True)
        ]
        steps = [
            [(pruner.estimate, (data, F.cross_entropy)), (pruner.prune_to, (0.4,)), (pruner.prune_to, (0.6,))]
            for pruner, (_, data) in zip(pruners, problems, strict=True)
        ]
        steps = [step for pair in zip(*steps, strict=True) for step in pair] if interleaved else steps[0] + steps[1]
        for method, arguments in steps:
            method(*arguments)
        return [{**pruner.masks, **net.state_dict()} for pruner, net in zip(pruners, nets, strict=True)]

    own = [dataclasses.replace(recipe) for _ in problems]
    for mine, theirs in zip(masks_and_weights(own), masks_and_weights([recipe, recipe]), strict=True):
        assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def test_a_name_and_its_recipe_are_the_same_along_a_schedule(generator):
    net, data = two_networks(generator)[0]
    results = []
    for curvature in ("fishleg", FishLeg(), FishLeg(carry_over=0)):
        model = copy.deepcopy(net)
        pruner = Pruner(model, curvature=curvature, num_grads=64, schedule=lambda step: 0.3 * (step + 1), data=data)
        assert pruner.step()
        assert pruner.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])  # which forgets


# merging


def observation(recipe, gradients):
    if recipe.observes == {"inputs"}:
        return Observation(len(gradients), inputs={"w": rows_of(gradients[:, 0], gradients.shape[1])})
    if "output_gradients" in recipe.observes:
        x, d = ({"w": rows_of(rows, gradients.shape[1])} for rows in (gradients[:, 0], gradients[..., 0]))
        return Observation(len(gradients), inputs=x, output_gradients=d)
    return Observation(len(gradients), gradients={"w": gradients})


@pytest.mark.parametrize("name", [name for name in MODELS if name != "fishleg"])
def test_merged_estimates_are_the_estimate_of_all_observations(name, generator):
    recipe = MODELS[name]()
    gradients = torch.randn(40, 5, 3, dtype=torch.float64, generator=generator)
    weights = {"w": gradients[0]}
    whole, first, second = (recipe.start(weights) for _ in range(3))
    for estimate, part in ((whole, gradients), (first, gradients[:13]), (second, gradients[13:])):
        estimate.update(observation(recipe, part))
    first.merge(second)
    torch.testing.assert_close(first.diag(), whole.diag(), rtol=1e-10, atol=0)
    torch.testing.assert_close(first.mul(weights), whole.mul(weights), rtol=1e-8, atol=1e-10)
    first.merge(recipe.start(weights))  # of nothing
    torch.testing.assert_close(first.diag(), whole.diag(), rtol=1e-10, atol=0)


def test_padding_is_as_before_after_a_merge(generator):
    recipe = BlockFisher(4, 1e-3)  # of 6 weights two in the last block are padding
    estimates = [recipe.start({"w": torch.zeros(6)}) for _ in range(2)]
    estimates[0].merge(estimates[1])
    assert estimates[0].state_dict()["gram"]["w"].diagonal(dim1=1, dim2=2)[1].tolist() == [0, 0, 1, 1]


def test_what_cannot_be_merged_says_so():
    weights = {"w": torch.zeros(2, 3)}
    with pytest.raises(NotImplementedError, match="estimates of FishLeg cannot be merged"):
        FishLeg().start(weights).merge(FishLeg().start(weights))
    with pytest.raises(ValueError, match="expected an estimate of BlockFisher.*damping=1e-05.*damping=0.1"):
        BlockFisher().start(weights).merge(BlockFisher(damping=0.1).start(weights))
    with pytest.raises(ValueError, match=r"expected an estimate of w \[2, 3\], got one of w \[3, 3\]"):
        BlockFisher().start(weights).merge(BlockFisher().start({"w": torch.zeros(3, 3)}))


# damping that had to be raised


SINGULAR = {
    "block": BlockFisher(4, 0.0),
    "layerwise": Layerwise(1e-12),
    "kronecker": Kronecker(1e-40),
    "fishleg": FishLeg(1e-22, batch_size=64),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_every_model_warns_of_raised_damping_once(name):
    """Of observations of rank 1."""
    recipe = SINGULAR[name]
    gradients = torch.ones(64, 1, 1) * torch.tensor([1.0, 2.0, 3.0, 0.5]).expand(4, 4)
    estimate = recipe.start({"w": gradients[0]})
    estimate.update(observation(recipe, gradients[:32]))
    raised = "are not positive definite with damping .*; it was raised tenfold"
    if name == "fishleg":
        raised = "damping 1e-22 is less than rounding may have left in Kronecker factors; it was raised to that"
    with pytest.warns(UserWarning, match=f"w: .*{raised}") as warned:
        estimate.diag()
    estimate.diag()  # told once: a second warning would be an error
    assert len(warned) == 1
    assert estimate.damping_raised["w"] >= 1


def test_what_no_damping_mends_is_named():
    estimate = Layerwise().start({"w": torch.zeros(2, 3)})
    estimate.update(Observation(4, inputs={"w": rows_of(torch.full((4, 3), torch.inf), 2)}))
    with pytest.raises(CurvatureError, match="w: 1 of 1 second moments of its layer's inputs cannot be inverted"):
        estimate.diag()


def test_raised_damping_of_kronecker_factors_is_in_the_history():
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    data = [(torch.ones(16, 4), torch.zeros(16, dtype=torch.long))]
    with pytest.warns(UserWarning, match="weight: .*Kronecker factors are not positive definite"):
        result = prune(net, data, sparsity=0.5, curvature=Kronecker(1e-40), num_grads=16, progress=False)
    assert result.history[0]["damping_raised"] == {"weight": 1}


def test_structures_may_be_pairs_and_nothing_else():
    pairs = FishLeg(structure=[("a", "block")])
    assert pairs == FishLeg(structure={"a": "block"})
    assert hash(pairs) == hash(FishLeg(structure=(["a", "block"],)))
    assert pairs.structures == {"a": "block"}
    for wrong in (5, ["rows"], [("a", "dense")], {"a": "dense"}, "dense"):
        with pytest.raises(ValueError, match="expected structure to be"):
            FishLeg(structure=wrong)
    with pytest.raises(TypeError, match="expected adam to be an Adam, got True"):
        FishLeg(adam=True)


def test_damping_raised_in_blocks_of_fishleg_is_counted():
    estimate = FishLeg(1e-12, structure="block").start({"w": torch.zeros(4, 4)})
    estimate.update(Observation(1, gradients={"w": torch.ones(1, 4, 4)}))
    with pytest.warns(UserWarning, match="w: 1 of 1 Fisher blocks are not positive definite"):
        estimate.diag()
    assert estimate.damping_raised == {"w": 1}


def test_layerwise_estimates_of_other_groups_are_merged(generator):
    """Of all rows, of two halves, and of four of six rows: each row has the inputs that it was multiplied by."""
    x = [torch.randn(g, 5, 3, dtype=torch.float64, generator=generator) for g in (1, 2, 1)]
    observed = [ProductRows(x[0], (0, 6)), ProductRows(x[1], (0, 6)), ProductRows(x[2], (2, 6))]
    estimates = [Layerwise().start({"w": torch.zeros(6, 3, dtype=torch.float64)}) for _ in range(2)]
    estimates[0].update(Observation(5, inputs={"w": observed[0]}))
    for rows in observed[1:]:
        estimates[1].update(Observation(0, inputs={"w": rows}))
    estimates[1].update(Observation(5))
    estimates[0].merge(estimates[1])
    gram = lambda rows: rows.mT @ rows
    expected = torch.stack([gram(x[0][0]) + gram(x[1][r // 3]) + (gram(x[2][0]) if r >= 2 else 0) for r in range(6)])
    torch.testing.assert_close(estimates[0].state_dict()["gram"]["w"], expected)
    assert estimates[0].state_dict()["count"] == {"w": 10}
    with pytest.raises(TypeError, match="expected an estimate, got Layerwise"):
        estimates[0].merge(Layerwise())
