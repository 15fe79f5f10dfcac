"""obs_quantize: by its definition, its costs, and what it does with pruned and free weights."""

import pytest
import torch

from fishleg_ext import ops
from fishleg_ext.testing.cases import random_spd


def by_definition(weight, inverse, alive, values, order):
    """One block in float64: condition, choose, move, all with the inverse of what is left computed anew."""
    fisher = torch.linalg.inv(inverse)
    w, size = weight.clone(), len(weight)
    codes, total = torch.zeros(size, dtype=torch.long), 0.0
    pending = [i for i in range(size) if alive[i] or order == "given"]
    moving = list(pending)
    step = lambda a, b: (values[a] - values[b]).abs() / 2
    while pending:
        rest = [i for i in moving if i in pending]
        h = torch.linalg.inv(fisher[rest][:, rest])
        nearest = {i: int((values - w[i]).abs().argmin()) for i in rest}
        target = {i: values[nearest[i]] if alive[i] else torch.tensor(0.0).double() for i in rest}
        cost = {i: (w[i] - target[i]) ** 2 / (2 * h[k, k]) for k, i in enumerate(rest)}
        beyond = [i for i in rest if w[i] < values[0] - step(1, 0) or w[i] > values[-1] + step(-1, -2)]
        q = rest[0] if order == "given" else min(beyond or rest, key=lambda i: float(cost[i]))
        k, total = rest.index(q), total + cost[q]
        w[rest] -= h[:, k] * (w[q] - target[q]) / h[k, k]
        w[q], codes[q] = target[q], nearest[q] if alive[q] else 0
        pending.remove(q)
    return codes, torch.where(torch.tensor([bool(a) for a in alive]), w, 0), total


@pytest.mark.parametrize("order", ["cheapest", "given"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_is_what_its_definition_says(order, impl, generator):
    weight = torch.randn(4, 9, generator=generator, dtype=torch.float64)
    inverse = random_spd(4, 9, 1e2, generator)
    alive = torch.rand(4, 9, generator=generator) < 0.7
    values = torch.tensor([-1.1, -0.3, 0.4, 0.9], dtype=torch.float64)
    options = {"order": order, "impl": impl} | ({"dead_first": True} if order == "cheapest" else {})
    weight = weight if order == "given" else weight * alive
    code, cost, moved = ops.obs_quantize(weight, inverse, alive, values[None, None], **options)
    for k in range(4):
        # With dead_first the inverse of the alive: that of their rows and columns of the Fisher matrix.
        codes, expected, total = by_definition(weight[k], inverse[k], alive[k], values, order)
        assert torch.equal(code[k].long(), codes)
        torch.testing.assert_close(moved[k], expected)
        torch.testing.assert_close(cost[k].sum(), total)


def test_greedy_costs_less_than_columns_and_columns_less_than_rounding(generator):
    weight = torch.randn(32, 60, generator=generator)
    inverse, alive = random_spd(1, 60, 1e3, generator).float(), torch.ones(32, 60, dtype=torch.bool)
    values = torch.linspace(-2, 2, 8)[None, None]
    run = lambda order: float(ops.obs_quantize(weight, inverse, alive, values, order=order)[1].sum())
    costs = {order: run(order) for order in ("cheapest", "given")}
    rounded = values.flatten()[(weight[..., None] - values[0]).abs().argmin(2)] - weight
    nearest = float((0.5 * (rounded.double() @ torch.linalg.inv(inverse[0].double())) * rounded).sum())
    assert costs["cheapest"] < costs["given"] < nearest


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_free_weights_end_where_the_loss_is_least(impl, generator):
    weight, inverse = torch.randn(3, 8, generator=generator, dtype=torch.float64), random_spd(3, 8, 1e2, generator)
    values = torch.tensor([[[-1.0, 0.0, 1.0]]], dtype=torch.float64)
    alive = torch.ones(3, 8, dtype=torch.bool)
    for order in ("cheapest", "given"):
        code, cost, moved = ops.obs_quantize(weight, inverse, alive, values, order=order, num_free=2, impl=impl)
        fisher = torch.linalg.inv(inverse)
        step = moved - weight
        torch.testing.assert_close((step[:, None] @ fisher)[:, 0, 6:], torch.zeros(3, 2, dtype=torch.float64))
        torch.testing.assert_close(cost.sum(1), 0.5 * (step[:, None] @ fisher @ step[..., None])[:, 0, 0])
        assert not code[:, 6:].any()


def test_segments_have_codes_of_their_own(generator):
    weight, alive = torch.randn(2, 6, generator=generator), torch.ones(2, 6, dtype=torch.bool)
    values = torch.tensor([[[-1.0, 1.0], [0.0, torch.inf]], [[3.0, 4.0], [-2.0, 2.0]]])
    for order in ("cheapest", "given"):
        code, _, moved = ops.obs_quantize(weight, torch.eye(6)[None], alive, values, order=order)
        assert set(moved[0, :3].tolist()) <= {-1.0, 1.0}
        assert moved[0, 3:].tolist() == [0.0] * 3
        assert set(moved[1, :3].tolist()) == {3.0}
        assert set(moved[1, 3:].tolist()) <= {-2.0, 2.0}
        assert code[0, 3:].tolist() == [0] * 3


def test_refuses_bad_input():
    weight, inverse, alive = torch.ones(2, 4), torch.eye(4)[None], torch.ones(2, 4, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"K = 2, got \[3, 1, 2\]"):
        ops.obs_quantize(weight, inverse, alive, torch.ones(3, 1, 2))
    with pytest.raises(ValueError, match="segments that divide 4 weights"):
        ops.obs_quantize(weight, inverse, alive, torch.ones(1, 3, 2))
    with pytest.raises(ValueError, match="1 to 256 codes"):
        ops.obs_quantize(weight, inverse, alive, torch.ones(1, 1, 257))
    with pytest.raises(ValueError, match="'cheapest' or 'given', got 'random'"):
        ops.obs_quantize(weight, inverse, alive, torch.ones(1, 1, 2), order="random")
    with pytest.raises(ValueError, match="num_free from 0 to the block size 4, got 5"):
        ops.obs_quantize(weight, inverse, alive, torch.ones(1, 1, 2), num_free=5)
