"""Running factors of the optimizer, against dense float64."""

import pytest
import torch
from torch import nn

from fishleg_ext.curvature import Adam
from fishleg_ext.curvature.learned_factors import DenseGradients, FactoredGradients
from fishleg_ext.optim.layers import Diagonal
from fishleg_ext.optim.running import DescendedFactors, RunningFactors

ROWS, COLS = 5, 7
LIKE = torch.empty(0, dtype=torch.float64)


@pytest.fixture(params=[1, 3], ids=["one row a sample", "three rows"])
def factored(request, generator):
    x = torch.randn(40, request.param, COLS, generator=generator, dtype=torch.float64)
    d = torch.randn(40, request.param, ROWS, generator=generator, dtype=torch.float64)
    return FactoredGradients(x, d * torch.logspace(0, 1, ROWS, dtype=torch.float64))


def multiplied_out(grads):
    return DenseGradients(grads.output_gradients.mT @ grads.inputs)


def symmetric(x):
    return x + x.mT


def running(**options):
    return RunningFactors(ROWS, COLS, LIKE, **{"learned": True} | options)


def test_what_gradients_say_of_themselves_is_the_same_in_factors(factored, generator):
    dense = multiplied_out(factored)
    row, col = (symmetric(torch.randn(n, n, generator=generator).double()) for n in (ROWS, COLS))
    g, v = dense.values, torch.randn(ROWS, COLS, generator=generator).double()
    for grads in (factored, dense):
        torch.testing.assert_close(grads.squared_norm(), (g * g).sum())
        torch.testing.assert_close(grads.along(v), torch.einsum("soi,oi->s", g, v))
        torch.testing.assert_close(
            grads.weighted_sum(v.flatten()[: len(g)].repeat(2)[: len(g)]),
            torch.einsum("s,soi->oi", v.flatten()[: len(g)].repeat(2)[: len(g)], g),
        )
        torch.testing.assert_close(grads.quadratic(row, col), torch.einsum("soi,op,spj,ji->", g, row, g, col))
        expected = torch.einsum("soi,o,soj,ji->", g, row[0], g, col)
        torch.testing.assert_close(grads.quadratic(row[0], col), expected)


@pytest.mark.parametrize("as_dense", [False, True])
def test_two_batches_of_closed_form_updates(factored, as_dense):
    """The moments of FishLeg's auxiliary loss by the inverses of the time, scaled to the mean diagonal of F."""
    factors, memory, damping = running(), 0.4, 1e-2
    g = multiplied_out(factored).values
    row, col = torch.eye(ROWS).double(), torch.eye(COLS).double()
    row_moment = col_moment = 0
    for number, part in enumerate((slice(0, 16), slice(16, 40))):
        batch = FactoredGradients(factored.inputs[part], factored.output_gradients[part])
        factors.observe([multiplied_out(batch) if as_dense else batch], memory)
        factors.invert(damping)
        moments = []
        for moment in (
            torch.einsum("soi,ij,spj->op", g[part], col @ col, g[part]),
            torch.einsum("soi,op,spj->ij", g[part], row @ row, g[part]),
        ):
            f = g[part].square().mean()
            moments.append(moment * f.sqrt() / moment.diagonal().mean())
        weight = max(1 / (number + 1), 1 - memory)
        row_moment, col_moment = (
            mean + weight * (new - mean) for mean, new in zip((row_moment, col_moment), moments, strict=True)
        )
        row, col = (torch.linalg.inv(m + damping**0.5 * torch.eye(len(m)).double()) for m in (row_moment, col_moment))
        torch.testing.assert_close(factors.row, row)
        torch.testing.assert_close(factors.col, col)


def test_independent_factors_are_found_exactly(generator):
    """E[d d^T] (x) E[x x^T] is F where d and x are independent: of all pairs of both, exactly."""
    x, d = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (COLS, ROWS))
    pairs = FactoredGradients(x.repeat(8, 1)[:, None], d.repeat_interleave(8, 0)[:, None])
    g = multiplied_out(pairs).values.flatten(1)
    fisher = g.mT @ g / len(g)
    for learned in (False, True):
        factors = running(learned=learned)
        for _ in range(3):
            factors.observe([pairs], 0.0)
            factors.invert(1e-9)
        torch.testing.assert_close(torch.kron(factors.row_moment, factors.col_moment), fisher)


def test_no_gradients_leave_damping_alone():
    factors = running()
    factors.observe([DenseGradients(torch.zeros(3, ROWS, COLS, dtype=torch.float64))], 0.9)
    factors.invert(1e-4)
    torch.testing.assert_close(torch.kron(factors.row, factors.col), 1e4 * torch.eye(ROWS * COLS).double())


def test_parts_of_a_batch_are_one_batch(factored):
    whole, parts = running(), running()
    whole.observe([factored], 0.9)
    parts.observe([factored.part(slice(0, 10)), factored.part(slice(10, 40))], 0.9)
    torch.testing.assert_close(parts.row_moment, whole.row_moment)
    torch.testing.assert_close(parts.col_moment, whole.col_moment)


def test_what_is_not_finite_is_told():
    factors = running()
    factors.observe([DenseGradients(torch.full((3, ROWS, COLS), torch.inf, dtype=torch.float64))], 0.9)
    assert int(factors.invert(1e-4)) != 0


@pytest.mark.parametrize("probes", [None, "gaussian", "gradients"])
def test_adam_comes_nearer_to_the_inverse(probes, factored):
    options = Adam(steps=None, scaled=False, probes=probes, learning_rate=0.02)
    factors, g = DescendedFactors(ROWS, COLS, LIKE, options, 1.0, 0), multiplied_out(factored).values.flatten(1)
    fisher = g.mT @ g / len(g) + torch.eye(g.shape[1]).double()

    def loss():
        q = torch.kron(factors.row, factors.col)
        return float(0.5 * (q @ fisher @ q).trace() - q.trace())

    factors.observe([factored], 0.9)
    factors.invert(1.0)
    first = loss()
    for step in range(200):
        x, d = (part.roll(7 * step, 0) for part in (factored.inputs, factored.output_gradients))
        factors.observe([FactoredGradients(x, d)], 0.9)
    factors.invert(1.0)
    least = -0.5 * float(torch.linalg.inv(fisher).trace())
    assert least < loss() < first
    assert first - loss() > 0.2 * (first - least)


def test_a_diagonal_is_a_running_mean_of_squares(generator):
    """A mean at first, then one that forgets."""
    diagonal, expected = Diagonal("w", nn.Parameter(torch.zeros(3))), torch.zeros(3)
    for number in range(1, 7):
        gradients = torch.randn(4, 3, generator=generator)
        diagonal.observe(gradients, 0.6)
        expected += max(1 / number, 0.4) * (gradients.square().mean(0) - expected)
        torch.testing.assert_close(diagonal.squares, expected)
    torch.testing.assert_close(diagonal.solve(torch.ones(3), 0.1), 1 / (expected + 0.1))
