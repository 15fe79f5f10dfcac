"""Supports by ADMM against the plain algorithm."""

import pytest
import torch
from oracles import cholesky_inverse, rows_of
from torch import nn

from fishleg_ext import Pruner, prune
from fishleg_ext.bench.studies.rivals import alps
from fishleg_ext.curvature import BlockFisher, FishLeg, Kronecker, Layerwise
from fishleg_ext.observation.types import Observation
from fishleg_ext.pruning.admm import admm_masks
from fishleg_ext.pruning.compensation import exact_update
from fishleg_ext.sparsity.patterns import UNSTRUCTURED, Pattern


def layer(rows, size, generator, damping=1e-3):
    """A weight and layerwise curvature of correlated inputs."""
    weight = torch.randn(rows, size, dtype=torch.float64, generator=generator)
    x = torch.randn(200, size, dtype=torch.float64, generator=generator)
    common = torch.randn(size // 4, size, dtype=torch.float64, generator=generator)
    x = 0.3 * x + torch.randn(200, size // 4, dtype=torch.float64, generator=generator) @ common
    estimate = Layerwise(damping).start({"w": weight})
    estimate.update(Observation(200, inputs={"w": rows_of(x, rows)}))
    fisher = x.mT @ x / 200
    return weight, estimate, fisher + damping * fisher.diagonal().mean() * torch.eye(size, dtype=torch.float64)


def cost(weight, fisher, kept):
    """Of the best weights with these zeros, row by row."""
    inverse, total = cholesky_inverse(fisher), 0.0
    for w, k in zip(weight, kept, strict=True):
        total += float(0.5 * w[~k] @ torch.linalg.solve(inverse[~k][:, ~k], w[~k])) if (~k).any() else 0.0
    return total


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4:8"])
def test_supports_are_those_of_the_plain_algorithm(seed, pattern):
    """One layer in float64, its curvature inverted once more on the way, gives the same support."""
    weight, estimate, fisher = layer(12, 32, torch.Generator().manual_seed(seed), damping=1e-2)
    alive, parsed = {"w": torch.ones(12, 32).bool()}, Pattern.parse(pattern)
    kept = admm_masks(estimate, {"w": weight}, alive, {"w": 192}, parsed)["w"]
    assert parsed.allows(kept)
    target = 0.5 if pattern == "unstructured" else (parsed.n, parsed.m)
    plain = alps(weight, fisher, target, damping=0.0)
    assert torch.equal(kept, plain != 0)
    assert cost(weight, fisher, kept) <= float(0.5 * ((plain - weight) @ fisher * (plain - weight)).sum()) * (1 + 1e-9)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "block4"])
@pytest.mark.parametrize(
    "recipe", [Layerwise(1e-2), BlockFisher(8, 1e-3), Kronecker(1e-3), FishLeg(1e-3)], ids=lambda recipe: recipe.name
)
def test_counts_and_patterns_under_every_curvature_with_blocks_and_in_rounds(recipe, pattern):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4))
    data = [(torch.randn(60, 8), torch.randint(4, (60,)))]
    params = ["0.weight"] if pattern != "unstructured" else None
    pruner = Pruner(
        net, curvature=recipe, saliency="admm", scope="layer", pattern=pattern, params=params, num_grads=60,
        progress=False,
    )  # fmt: skip
    before = None
    for sparsity in (0.25, 0.5):
        pruner.estimate(data, nn.functional.cross_entropy)
        result = pruner.prune_to(sparsity)
        for name, mask in result.masks.items():
            weight = net.get_parameter(name)
            assert (weight[~mask] == 0).all()
            assert int((~mask).sum()) == round(sparsity * mask.numel())
            assert before is None or not (mask & ~before[name]).any()  # the pruned stay so
        before = result.masks
    for name, mask in result.masks.items():
        assert Pattern.parse(pattern).allows(mask), name


def test_compensation_is_the_best_for_the_support(generator):
    weight, estimate, fisher = layer(3, 12, generator)
    kept = admm_masks(estimate, {"w": weight}, {"w": torch.ones(3, 12).bool()}, {"w": 18}, UNSTRUCTURED)
    moved = exact_update(estimate, {"w": weight}, kept)["w"]
    step = moved - weight
    assert float(0.5 * (step @ fisher * step).sum()) == pytest.approx(cost(weight, fisher, kept["w"]), rel=1e-6)


def test_one_threshold_for_all_is_refused():
    with pytest.raises(ValueError, match="saliency='admm' cannot be combined with one threshold for all"):
        prune(nn.Linear(4, 4), None, sparsity=0.5, saliency="admm", curvature="kronecker")


def test_nothing_to_prune_and_all_but_one_to_prune(generator):
    weight, estimate, _ = layer(2, 6, generator)
    alive = {"w": torch.ones(2, 6).bool()}
    assert admm_masks(estimate, {"w": weight}, alive, {"w": 0})["w"].all()
    assert int(admm_masks(estimate, {"w": weight}, alive, {"w": 11})["w"].sum()) == 1
