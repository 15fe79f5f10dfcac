"""Moments of gradients, dense and in factors, and when the column factor is computed anew."""

import pytest
import torch
from oracles import batches
from torch import nn
from torch.nn import functional as F

from fishleg_ext.curvature import FishLeg, kronecker, learned_factors
from fishleg_ext.curvature.learned_factors import DenseGradients, FactoredGradients, LearnedFactors
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation


@pytest.mark.parametrize("positions", [1, 2, 5])
@pytest.mark.parametrize("diagonal", [True, False])
@pytest.mark.parametrize("panels", [(256, 8), (1, 8), (1, 2), (3, 8)])
def test_moments_are_those_of_the_formula(panels, positions, diagonal, generator, monkeypatch):
    monkeypatch.setattr(kronecker, "PANEL", panels[0])
    monkeypatch.setattr(kronecker, "MOST_PANELS", panels[1])
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)
    x, d, row, col = draw(6, positions, 4), draw(6, positions, 3), draw(3, 3), draw(4, 4)
    row, col = row @ row.mT, col @ col.mT
    gradients = d.mT @ x
    p = row.diagonal().diag() if diagonal else row
    by_col = sum(g.mT @ p @ p @ g for g in gradients)
    by_row = sum(g @ col @ col @ g.mT for g in gradients)
    for given in (DenseGradients(gradients), FactoredGradients(x, d)):
        assert len(given) == 6
        moment = torch.ones(4, 4, dtype=torch.float64)
        given.add_col_moment_(moment, row.diagonal() if diagonal else row, 0.5)
        torch.testing.assert_close(moment, 1 + 0.5 * by_col)
        moment = torch.ones(3, dtype=torch.float64) if diagonal else torch.ones(3, 3, dtype=torch.float64)
        given.add_row_moment_(moment, col, 0.5)
        torch.testing.assert_close(moment, 1 + 0.5 * (by_row.diagonal() if diagonal else by_row))


@pytest.mark.parametrize("size", [65, 200, 1001])
def test_directions_are_orthogonal_and_as_long_as_they_are_to_be(size):
    number = learned_factors.num_directions(size)
    given = lambda seed, dtype=torch.float64: learned_factors.random_directions(size, seed, dtype, torch.device("cpu"))
    products = given(1).mT @ given(1)
    torch.testing.assert_close(products, size / number * torch.eye(number, dtype=torch.float64))
    assert not torch.equal(given(1), given(2))
    torch.testing.assert_close(given(1, torch.float32), given(1).float(), rtol=0, atol=1e-6)


def test_no_vector_is_overlooked_by_random_directions():
    """Constant, alternating, one entry, smooth: in the mean over draws as long as it is."""
    size, draws = 90, 600
    spike = torch.zeros(size, dtype=torch.float64)
    spike[7] = 1
    line = torch.linspace(0, 1, size, dtype=torch.float64)
    vectors = torch.stack([torch.ones_like(spike), torch.cos(torch.pi * torch.arange(size)).double(), spike, line])
    vectors /= vectors.norm(dim=1, keepdim=True)
    squares = [
        (vectors @ learned_factors.random_directions(size, seed, torch.float64, torch.device("cpu"))).square().sum(1)
        for seed in range(draws)
    ]
    found = torch.stack(squares)
    assert ((found.mean(0) - 1).abs() < 4 * found.std(0) / draws**0.5).all()


def test_lengths_along_directions_are_right_in_the_mean(monkeypatch, generator):
    monkeypatch.setattr(learned_factors, "LEAST_DIRECTIONS", 4)
    like = torch.zeros(0, dtype=torch.float64)
    learned = LearnedFactors.start(1e-3, True, like, 3, 32)
    root = torch.randn(32, 32, dtype=torch.float64, generator=generator)
    learned.col = root @ root.mT
    vector = torch.randn(32, dtype=torch.float64, generator=generator)
    lengths = []
    for seen in range(400):
        learned.seen = seen
        lengths.append((vector @ learned._along_directions()).square().sum())
    mean = torch.stack(lengths)
    error = mean.std() / 400**0.5
    assert abs(mean.mean() - (vector @ learned.col).square().sum()) < 4 * error
    assert error < 0.1 * mean.mean()


def gradients_of(net, x, y, recipe):
    """The same gradients as an estimate takes them from a network, and as it takes tensors."""
    weights = {"weight": net.weight, "bias": net.bias}
    observed = recipe.start({"weight": net.weight.detach()}, {"weight": "bias"})
    biases = {"weight": ("bias", net.bias)}
    observe(net, batches(x, y, 16), F.cross_entropy, observed, weights, biases=biases, num_grads=len(x))
    given = recipe.start({"weight": net.weight.detach()}, {"weight": "bias"})
    for start in range(0, len(x), 64):
        part = slice(start, start + 64)
        outputs = net(x[part])
        d = outputs.softmax(1) - F.one_hot(y[part], outputs.shape[1])
        given.update(Observation(len(d), gradients={"weight": d[:, :, None] * x[part, None], "bias": d}))
    return observed, given


@pytest.mark.parametrize("structure", ["rows", "kronecker"])
@pytest.mark.parametrize("often", [True, False])
def test_what_is_learned_from_factors_is_what_is_learned_from_gradients(structure, often, monkeypatch, generator):
    monkeypatch.setattr(learned_factors, "INVERSION", 0 if often else float("inf"))
    net = nn.Linear(7, 5).double().requires_grad_(False)
    net.weight.requires_grad_()
    net.bias.requires_grad_()
    x = torch.randn(150, 7, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 5, (150,), generator=generator)
    for batch_size in (16, 64, 100):
        with torch.no_grad():
            observed, given = gradients_of(net, x, y, FishLeg(1e-3, batch_size=batch_size, structure=structure))
        for mine, theirs in zip(observed.factors("weight")[:2], given.factors("weight")[:2], strict=True):
            torch.testing.assert_close(mine, theirs)


def test_the_column_factor_is_of_all_gradients_in_the_end(monkeypatch, generator):
    """However seldom it is computed: M is the inverse of the damped moment, up to its trace."""
    monkeypatch.setattr(learned_factors, "INVERSION", float("inf"))
    inversions = []
    invert = LearnedFactors._invert_col
    monkeypatch.setattr(LearnedFactors, "_invert_col", lambda self: (inversions.append(self.seen), invert(self)))
    learned = LearnedFactors.start(1e-2, True, torch.zeros(0, dtype=torch.float64), 4, 6)
    for _ in range(20):
        learned.learn([DenseGradients(torch.randn(10, 4, 6, dtype=torch.float64, generator=generator))])
    assert inversions == [10, 20, 30, 50, 80, 120, 180]
    row, col, _ = learned.factors()
    assert inversions[-1] == 200
    damped = learned.col_moment + 1e-2 * learned.row.square().sum() * torch.eye(6)
    inverse = torch.linalg.inv(damped)
    torch.testing.assert_close(col, inverse / inverse.trace())
    torch.testing.assert_close(row.sum(), inverse.trace())


@pytest.mark.parametrize("part", ["row", "col"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_factors_that_are_not_finite_have_failed(part, value):
    learned = LearnedFactors.start(1e-3, True, torch.zeros(0, dtype=torch.float64), 3, 5)
    learned.factors()
    assert learned.failed == 0
    getattr(learned, part).view(-1)[1] = value
    learned.factors()
    assert learned.failed != 0
