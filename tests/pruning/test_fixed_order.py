"""SparseGPT's sweep against its definition: invert what is left of the Fisher matrix at every column."""

import pytest
import torch
from oracles import rows_of

from fishleg_ext.curvature import BlockFisher, CurvatureError, Layerwise
from fishleg_ext.observation.types import Observation
from fishleg_ext.pruning import fixed_order
from fishleg_ext.pruning.fixed_order import fixed_order_prune


def estimated(inputs, weight, damping=1e-3):
    curvature = Layerwise(damping)
    curvature = curvature.start({"w": weight})
    curvature.update(Observation(len(inputs), inputs={"w": rows_of(inputs, len(weight))}))
    moment = inputs.mT @ inputs / len(inputs)
    return curvature, moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def by_definition(weight, fisher, alive, count_of):
    """One row after the other, one column after the other, with an inversion at each."""
    weight, keep = weight.clone(), torch.ones_like(alive)
    size = weight.shape[1]
    for start in range(0, size, fixed_order.COLUMNS):
        part = range(start, min(start + fixed_order.COLUMNS, size))
        variances = torch.stack([torch.linalg.inv(fisher[j:, j:])[0, 0] for j in part])
        score = torch.where(alive[:, part], weight[:, part].square() / (2 * variances), -1.0)
        lowest = score.flatten().argsort(stable=True)[: count_of(part)]
        kept = torch.ones(score.numel(), dtype=torch.bool)
        kept[lowest] = False
        keep[:, part] = kept.reshape(score.shape)
        for j in part:
            inverse = torch.linalg.inv(fisher[j:, j:])
            step = torch.where(keep[:, j], 0, weight[:, j] / inverse[0, 0])
            weight[:, j:] -= step[:, None] * inverse[0]
    return weight * keep, keep


@pytest.mark.parametrize("columns", [4, 5, 128])
@pytest.mark.parametrize("dead", [False, True])
def test_a_sweep_is_elimination_in_the_order_of_the_columns(columns, dead, generator, monkeypatch):
    monkeypatch.setattr(fixed_order, "COLUMNS", columns)
    weight = torch.randn(6, 12, dtype=torch.float64, generator=generator)
    inputs = torch.randn(40, 12, dtype=torch.float64, generator=generator)
    alive = torch.ones(6, 12, dtype=torch.bool)
    if dead:
        alive[:, 9] = False
        alive[2, :5] = False
        weight = weight * alive
    curvature, fisher = estimated(inputs, weight)
    masks, moved = fixed_order_prune(curvature, {"w": weight}, {"w": alive}, {"w": 36})
    assert int((~masks["w"]).sum()) == 36
    assert not masks["w"][~alive].any()
    counts = {part: int((~masks["w"][:, list(part)]).sum()) for part in parts(12, columns)}
    expected, keep = by_definition(weight, fisher, alive, counts.__getitem__)
    assert torch.equal(masks["w"], keep)
    torch.testing.assert_close(moved["w"], expected)
    assert not moved["w"][~keep].any()
    if not dead:  # the same share of each part
        assert all(abs(count - 3 * len(part)) <= 1 for part, count in counts.items())


def parts(size, columns):
    return [range(start, min(start + columns, size)) for start in range(0, size, columns)]


@pytest.mark.parametrize("count", [0, 11, 36, 71, 72])
def test_the_count_is_exact_wherever_the_dead_are(count, generator, monkeypatch):
    monkeypatch.setattr(fixed_order, "COLUMNS", 5)
    weight = torch.randn(6, 12, dtype=torch.float64, generator=generator)
    curvature, _ = estimated(torch.randn(40, 12, dtype=torch.float64, generator=generator), weight)
    for place in (slice(0, 2), slice(10, 12)):
        alive = torch.ones(6, 12, dtype=torch.bool)
        alive[: min(6, count // 2), place] = False
        masks, _ = fixed_order_prune(curvature, {"w": weight * alive}, {"w": alive}, {"w": count})
        assert int((~masks["w"]).sum()) == count
        assert not masks["w"][~alive].any()


def test_blocks_with_inverses_of_their_own_are_swept_each_by_its_own(generator, monkeypatch):
    """The blocks of BlockFisher: as if each were a parameter, with the counts that the joint choice gave it."""
    monkeypatch.setattr(fixed_order, "COLUMNS", 3)
    weight = torch.randn(3, 8, dtype=torch.float64, generator=generator)
    curvature = BlockFisher(8, 1e-2)
    curvature = curvature.start({"w": weight})
    grads = torch.randn(30, 3, 8, dtype=torch.float64, generator=generator)
    curvature.update(Observation(30, gradients={"w": grads}))
    alive = torch.ones(3, 8, dtype=torch.bool)
    masks, moved = fixed_order_prune(curvature, {"w": weight}, {"w": alive}, {"w": 12})
    assert int((~masks["w"]).sum()) == 12
    for row in range(3):
        fisher = grads[:, row].mT @ grads[:, row] / 30 + 1e-2 * torch.eye(8, dtype=torch.float64)
        counts = {part: int((~masks["w"][row, list(part)]).sum()) for part in parts(8, 3)}
        expected, keep = by_definition(weight[row : row + 1], fisher, alive[:1], counts.__getitem__)
        assert torch.equal(masks["w"][row], keep[0])
        torch.testing.assert_close(moved["w"][row], expected[0])


def test_an_inverse_that_is_not_positive_definite_is_named(generator, monkeypatch):
    weight = torch.randn(2, 3, generator=generator)
    curvature, _ = estimated(torch.randn(40, 3, generator=generator), weight)
    fisher, damping = curvature._fisher("w")
    monkeypatch.setattr(curvature, "_fisher", lambda name: (-fisher, damping))
    with pytest.raises(CurvatureError, match="w: the inverse is not positive definite"):
        fixed_order_prune(curvature, {"w": weight}, {"w": torch.ones(2, 3, dtype=torch.bool)}, {"w": 3})
