"""obs_score, obs_eliminate, obs_compensate."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import cholesky_inverse, joint_cost, naive_elimination, order_of

from fishleg_ext import ops


@pytest.fixture(autouse=True, scope="module", params=["auto", "reference"])
def impl(request):
    """On a CPU "auto" is the panelled elimination, and the specification the other."""
    with ops.use_impl(request.param):
        yield


SIZES = [1, 2, 7, 16, 33, 128]


def problem(fisher, generator, k, b, condition=1e3, dtype=torch.float64):
    inverse = cholesky_inverse(fisher(k, b, condition))
    weight = torch.randn(k, b, dtype=torch.float64, generator=generator)
    return weight.to(dtype), inverse.to(dtype), torch.ones(k, b, dtype=torch.bool)


# obs_score


def test_score_is_the_single_weight_formula(generator):
    weight = torch.randn(3, 4, generator=generator)
    diagonal = torch.rand(3, 4, generator=generator)
    torch.testing.assert_close(ops.obs_score(weight, diagonal), weight**2 / (2 * diagonal))


def test_score_comes_in_the_inverses_dtype_float32_at_least():
    score = ops.obs_score(torch.ones(2, dtype=torch.float64), torch.ones(2, dtype=torch.bfloat16))
    assert score.dtype == torch.float32
    assert ops.obs_score(torch.ones(2), torch.ones(2, dtype=torch.float64)).dtype == torch.float64


def test_score_of_zeros_and_nans():
    score = ops.obs_score(torch.tensor([0.0, 1.0, torch.nan, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
    assert score[0] == 0
    assert score[1] == torch.inf
    assert score[2:].isnan().all()


def test_score_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"inverse_diagonal .*\[3\], got \[2\]"):
        ops.obs_score(torch.ones(3), torch.ones(2))


# obs_eliminate


@pytest.mark.parametrize("b", SIZES)
def test_elimination_follows_the_formulas(b, fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 4, b)
    alive &= torch.rand(4, b, generator=generator) < 0.8
    alive_fisher = torch.where(alive[:, :, None] & alive[:, None, :], cholesky_inverse(inverse), 0)
    alive_fisher += torch.diag_embed((~alive).double())
    inverse = cholesky_inverse(alive_fisher)
    rank, cost = ops.obs_eliminate(weight, inverse, alive)
    assert rank.dtype == torch.int32
    for k in range(4):
        order, costs = naive_elimination(weight[k], inverse[k], alive[k])
        assert order_of(rank[k]) == order
        torch.testing.assert_close(cost[k][order], torch.tensor(costs, dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert (rank[~alive] == -1).all()
    assert (cost[~alive] == torch.inf).all()


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e5])
def test_costs_add_up_to_the_joint_cost(condition, fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 3, 24, condition)
    rank, cost = ops.obs_eliminate(weight, inverse, alive)
    for count in (1, 5, 24):
        for k in range(3):
            gone = rank[k] < count
            torch.testing.assert_close(cost[k][gone].sum(), joint_cost(weight[k], inverse[k], gone), rtol=1e-8, atol=0)


@pytest.mark.parametrize("b", SIZES)
def test_single_precision_takes_an_order_as_cheap(b, fisher, generator):
    """Costs along the order that float32 took, recomputed in float64, are its costs, and are greedily minimal."""
    weight, inverse, alive = problem(fisher, generator, 5, b, 1e3, torch.float32)
    rank, cost = ops.obs_eliminate(weight, inverse, alive)
    assert cost.dtype == torch.float32
    bound = 50 * torch.finfo(torch.float32).eps * 1e3  # of cond(H)
    for k in range(5):
        w, h, left = weight[k].double(), inverse[k].double(), alive[k].clone()
        for q in order_of(rank[k]):
            scores = torch.where(left, w**2 / (2 * h.diagonal()), torch.inf)
            scale = scores[q] + 1e-3 * cost[k].max()
            assert scores[q] - scores.min() <= bound * scale
            assert abs(scores[q] - cost[k, q]) <= bound * scale
            w = w - h[:, q] * w[q] / h[q, q]
            h = h - torch.outer(h[:, q], h[q]) / h[q, q]
            left[q] = False


def test_ties_go_to_the_lowest_index():
    rank, cost = ops.obs_eliminate(torch.ones(2, 6), torch.eye(6)[None], torch.ones(2, 6, dtype=torch.bool))
    assert rank.tolist() == [list(range(6))] * 2
    assert (cost == 0.5).all()


def test_zero_weights_go_first_and_cost_nothing(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 1, 8)
    weight[0, [5, 2]] = 0
    rank, cost = ops.obs_eliminate(weight, inverse, alive)
    assert rank[0, [2, 5]].tolist() == [0, 1]
    assert not cost[0, [2, 5]].any()


def test_shared_inverse_equals_copies_of_it(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 6, 9)
    alive[2, 3:] = False
    shared = ops.obs_eliminate(weight, inverse[:1], alive, dead_first=True)
    expanded = ops.obs_eliminate(weight, inverse[:1].expand(6, 9, 9), alive, dead_first=True)
    copied = ops.obs_eliminate(weight, inverse[:1].repeat(6, 1, 1), alive, dead_first=True)
    for got in (shared, expanded):
        assert torch.equal(got[0], copied[0])
        assert torch.equal(got[1], copied[1])


@pytest.mark.parametrize("options", [{}, {"group": 2}, {"group": 4}, {"n": 2, "m": 4}, {"stop": 0.1}])
def test_dead_rows_are_not_read(options, fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 2, 12)
    alive[:, [1, 6]] = False
    expected = ops.obs_eliminate(weight, inverse, alive, **options)
    assert (expected[0][alive] < 12).any()
    dirty = inverse.clone()
    dirty[:, [1, 6]] = torch.nan
    dirty[:, :, [1, 6]] = torch.nan
    weight = weight.clone()
    weight[:, [1, 6]] = torch.nan
    for got, want in zip(ops.obs_eliminate(weight, dirty, alive, **options), expected, strict=True):
        assert torch.equal(got, want)


def test_dead_first_conditions_on_the_dead(fisher, generator):
    """Eliminating the dead from the whole inverse is inverting the alive sub-block of the Fisher."""
    weight, inverse, alive = problem(fisher, generator, 5, 12)
    alive &= torch.rand(5, 12, generator=generator) < 0.6
    alive[4] = True
    got = ops.obs_eliminate(weight, inverse, alive, dead_first=True)
    matrix = torch.where(alive[:, :, None] & alive[:, None, :], cholesky_inverse(inverse), 0)
    matrix += torch.diag_embed((~alive).double())
    want = ops.obs_eliminate(weight, cholesky_inverse(matrix), alive)
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=1e-8, atol=1e-12)


def test_stop_ends_each_block_where_its_next_cost_exceeds(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 6, 20)
    rank, cost = ops.obs_eliminate(weight, inverse, alive)
    stop = float(cost.median())
    early_rank, early_cost = ops.obs_eliminate(weight, inverse, alive, stop=stop)
    for k in range(6):
        order = order_of(rank[k])
        reached = next((i for i, q in enumerate(order) if cost[k, q] > stop), len(order))
        assert order_of(early_rank[k]) == order[:reached]
        assert (early_rank[k, order[reached:]] == 20).all()
        assert (early_cost[k, order[reached:]] == torch.inf).all()
        torch.testing.assert_close(early_cost[k, order[:reached]], cost[k, order[:reached]])
    assert ops.obs_eliminate(weight, inverse, alive, stop=-1.0)[0].unique().tolist() == [20]


@pytest.mark.parametrize("group", [2, 4, 12])
def test_groups_go_whole_at_their_joint_cost(group, fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 3, 12)
    alive[0, 5] = False  # a group with a dead member
    rank, cost = ops.obs_eliminate(weight, inverse, alive, group=group, dead_first=True)
    for k in range(3):
        w = weight[k].clone()
        w[~alive[k]] = 0
        h, left = inverse[k].clone(), alive[k].clone()
        for q in (~left).nonzero()[:, 0].tolist():
            h = h - torch.outer(h[:, q], h[q]) / h[q, q]
        next_rank = 0
        while left.any():
            joint = {}
            for g in range(12 // group):
                members = torch.arange(g * group, (g + 1) * group)
                members = members[left[members]]
                if len(members):
                    chosen = torch.zeros(12, dtype=torch.bool)
                    chosen[members] = True
                    joint[g] = (float(joint_cost(w, h, chosen)), members)
            best, members = min(joint.values(), key=lambda item: item[0])
            assert rank[k, members].tolist() == list(range(next_rank, next_rank + len(members)))
            torch.testing.assert_close(float(cost[k, members].sum()), best, rtol=1e-8, atol=1e-12)
            assert len(cost[k, members].unique()) == 1
            next_rank += len(members)
            for q in members.tolist():
                w = w - h[:, q] * w[q] / h[q, q]
                h = h - torch.outer(h[:, q], h[q]) / h[q, q]
                left[q] = False


@pytest.mark.parametrize("n, m", [(2, 4), (1, 4), (4, 8), (0, 4), (4, 4)])
def test_nm_closes_groups(n, m, fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 3, 16)
    rank, cost = ops.obs_eliminate(weight, inverse, alive, n=n, m=m)
    kept = (rank == 16).unflatten(1, (-1, m)).sum(2)
    assert (kept == n).all()
    free, _ = ops.obs_eliminate(weight, inverse, alive)
    for k in range(3):  # as long as no group is closed both orders agree
        lost = dict.fromkeys(range(16 // m), 0)
        for position, q in enumerate(order_of(free[k])):
            if lost[q // m] == m - n:
                break
            assert rank[k, q] == position
            lost[q // m] += 1
    assert torch.equal(cost.isinf(), rank == 16)


def test_dead_weights_count_as_lost_in_nm(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 1, 8)
    alive[0, [0, 1, 4]] = False
    rank, _ = ops.obs_eliminate(weight, inverse, alive, n=2, m=4, dead_first=True)
    assert rank[0, 2:4].tolist() == [8, 8]
    assert (rank[0, 5:] == 8).sum() == 2


def test_costs_that_are_not_finite_are_never_reached():
    weight = torch.tensor([[1.0, torch.nan, 2.0, torch.inf]])
    rank, cost = ops.obs_eliminate(weight, torch.eye(4)[None], torch.ones(1, 4, dtype=torch.bool))
    assert rank.tolist() == [[0, 4, 1, 4]]
    assert cost[0, [1, 3]].isinf().all()
    broken = torch.diag(torch.tensor([1.0, 0.0, -1.0]))[None]
    rank, _ = ops.obs_eliminate(torch.ones(1, 3), broken, torch.ones(1, 3, dtype=torch.bool))
    assert rank.tolist() == [[0, 3, 3]]


def test_a_group_with_dead_members_goes_by_its_joint_cost():
    """0.605 for the one that is left of the first group, 1.0 for the two of the second."""
    weight, alive = torch.tensor([[1.1, 0.0, 1.0, 1.0]]), torch.tensor([[True, False, True, True]])
    rank, cost = ops.obs_eliminate(weight, torch.eye(4)[None], alive, group=2)
    assert rank.tolist() == [[0, -1, 1, 2]]
    torch.testing.assert_close(cost, torch.tensor([[0.605, torch.inf, 0.5, 0.5]]))
    assert ops.obs_eliminate(weight, torch.eye(4)[None], alive, group=2, stop=0.7)[0].tolist() == [[0, -1, 4, 4]]


def test_dead_weights_that_the_inverse_leaves_out_move_nothing(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 2, 6)
    alive[:, 2] = False
    inverse = torch.where(alive[:, :, None] & alive[:, None, :], inverse, 0)
    expected = ops.obs_eliminate(weight, inverse, alive)
    got = ops.obs_eliminate(weight, inverse, alive, dead_first=True)
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1])


@pytest.mark.parametrize("options", [{}, {"group": 3}, {"n": 1, "m": 3}, {"dead_first": True}])
def test_blocks_worked_on_in_several_batches_do_not_differ(options, fisher, generator, monkeypatch):
    weight, inverse, alive = problem(fisher, generator, 10, 12)
    alive &= torch.rand(10, 12, generator=generator) < 0.8
    pruned = torch.rand(10, 12, generator=generator) < 0.5
    expected = (*ops.obs_eliminate(weight, inverse, alive, **options), ops.obs_compensate(weight, inverse, pruned))
    monkeypatch.setattr("fishleg_ext.reference.batches.CPU_BYTES", 3 * 12 * 12 * 8)
    got = (*ops.obs_eliminate(weight, inverse, alive, **options), ops.obs_compensate(weight, inverse, pruned))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_elimination_of_nothing():
    for k, b in [(0, 4), (3, 1)]:
        rank, cost = ops.obs_eliminate(
            torch.ones(k, b), torch.eye(b).repeat(k, 1, 1), torch.zeros(k, b, dtype=torch.bool)
        )
        assert (rank == -1).all()
        assert cost.shape == (k, b)


def test_elimination_reads_views_and_half_precision(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 3, 8, dtype=torch.float32)
    expected = ops.obs_eliminate(weight, inverse, alive)
    strided = torch.empty(8, 3, 16)[:, :, ::2].permute(1, 0, 2)
    strided.copy_(inverse)
    got = ops.obs_eliminate(weight.mT.contiguous().mT, strided, alive.mT.contiguous().mT)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])
    half = ops.obs_eliminate(weight.bfloat16(), inverse.bfloat16(), alive)
    wide = ops.obs_eliminate(weight.bfloat16().float(), inverse.bfloat16().float(), alive)
    assert half[1].dtype == torch.float32
    assert torch.equal(half[0], wide[0])


def test_elimination_refuses_bad_input():
    weight, inverse = torch.ones(12, 64), torch.eye(64).repeat(12, 1, 1)
    alive = torch.ones(12, 64, dtype=torch.bool)
    with pytest.raises(
        ValueError,
        match=r"expected inverse of shape \[K or 1, B, B\] = \[12, 64, 64\], got \[12, 64, 32\]",
    ):
        ops.obs_eliminate(weight, inverse[:, :, :32], alive)
    with pytest.raises(ValueError, match=r"alive of shape \[K, B\] = \[12, 64\], got \[64\]"):
        ops.obs_eliminate(weight, inverse, alive[0])
    with pytest.raises(TypeError, match=r"alive of dtype torch.bool, got torch.float32"):
        ops.obs_eliminate(weight, inverse, alive.float())
    with pytest.raises(ValueError, match="group to divide the block size 64, got 5"):
        ops.obs_eliminate(weight, inverse, alive, group=5)
    with pytest.raises(ValueError, match="n=5, m=4"):
        ops.obs_eliminate(weight, inverse, alive, n=5, m=4)
    with pytest.raises(ValueError, match="either group > 1 or n:m"):
        ops.obs_eliminate(weight, inverse, alive, n=2, m=4, group=4)
    with pytest.raises(ValueError, match="NaN"):
        ops.obs_eliminate(weight, inverse, alive, stop=float("nan"))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 12))
def test_permuting_a_block_permutes_the_answer(seed, size):
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(3 * size, size, dtype=torch.float64, generator=generator)
    inverse = cholesky_inverse((grads.mT @ grads / len(grads) + 0.01 * torch.eye(size))[None])
    weight = torch.randn(1, size, dtype=torch.float64, generator=generator)
    alive = torch.ones(1, size, dtype=torch.bool)
    permutation = torch.randperm(size, generator=generator)
    rank, cost = ops.obs_eliminate(weight, inverse, alive)
    permuted = ops.obs_eliminate(weight[:, permutation], inverse[:, permutation][:, :, permutation], alive)
    assert torch.equal(permuted[0], rank[:, permutation])
    torch.testing.assert_close(permuted[1], cost[:, permutation], rtol=1e-9, atol=1e-12)


# obs_compensate


@pytest.mark.parametrize("b", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_compensation_is_the_joint_update(b, dtype, fisher, generator):
    weight, inverse, _ = problem(fisher, generator, 5, b)
    pruned = torch.rand(5, b, generator=generator) < 0.6
    pruned[0], pruned[1] = False, True
    moved = ops.obs_compensate(weight.to(dtype), inverse.to(dtype), pruned)
    assert moved.dtype == dtype
    assert not moved[pruned].any()
    bound = 100 * torch.finfo(dtype).eps * 1e3  # of cond(H)
    for k in range(5):
        p = pruned[k]
        step = inverse[k][:, p] @ torch.linalg.solve(inverse[k][p][:, p], weight[k][p])
        expected = torch.where(p, 0, weight[k] - step)
        assert (moved[k].double() - expected).norm() <= bound * weight[k].norm()
    assert torch.equal(moved[0], weight[0].to(dtype))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32 - 1), size=st.integers(2, 10))
def test_no_other_weights_with_these_zeros_are_better(seed, size):
    generator = torch.Generator().manual_seed(seed)
    grads = torch.randn(3 * size, size, dtype=torch.float64, generator=generator)
    matrix = grads.mT @ grads / len(grads) + 0.01 * torch.eye(size)
    weight = torch.randn(1, size, dtype=torch.float64, generator=generator)
    pruned = torch.rand(1, size, generator=generator) < 0.5
    moved = ops.obs_compensate(weight, cholesky_inverse(matrix[None]), pruned)
    loss = lambda w: float((w - weight)[0] @ matrix @ (w - weight)[0] / 2)
    noise = torch.randn(size, dtype=torch.float64, generator=generator)
    for scale in (1e-3, 1e-1, 1.0):
        assert loss(moved) <= loss(torch.where(pruned, 0, moved + scale * noise)) + 1e-12
    assert loss(moved) <= loss(torch.where(pruned, 0, weight)) + 1e-12


def test_compensation_after_elimination_moves_weights_as_it_did(fisher, generator):
    weight, inverse, alive = problem(fisher, generator, 2, 10)
    rank, _ = ops.obs_eliminate(weight, inverse, alive)
    gone = rank < 6
    for k in range(2):
        w, h = weight[k].clone(), inverse[k].clone()
        for q in order_of(rank[k])[:6]:
            w = w - h[:, q] * w[q] / h[q, q]
            h = h - torch.outer(h[:, q], h[q]) / h[q, q]
        expected = torch.where(gone[k], 0, w)
        torch.testing.assert_close(ops.obs_compensate(weight, inverse, gone)[k], expected, rtol=1e-7, atol=1e-9)


def test_compensation_skips_a_zero_diagonal(fisher, generator):
    weight, inverse, _ = problem(fisher, generator, 1, 6)
    inverse[:, 2] = 0
    inverse[:, :, 2] = 0
    pruned = torch.zeros(1, 6, dtype=torch.bool)
    pruned[0, [2, 4]] = True
    moved = ops.obs_compensate(weight, inverse, pruned)
    alone = ops.obs_compensate(weight, inverse, pruned & (torch.arange(6) == 4))
    alone[0, 2] = 0
    assert torch.equal(moved, alone)
    weight[0, 2] = 1e35  # over a damped zero this would overflow
    assert ops.obs_compensate(weight.float(), inverse.float(), pruned).isfinite().all()


def test_compensation_with_a_shared_inverse(fisher, generator):
    weight, inverse, _ = problem(fisher, generator, 4, 6)
    pruned = torch.rand(4, 6, generator=generator) < 0.5
    shared = ops.obs_compensate(weight, inverse[:1], pruned)
    torch.testing.assert_close(shared, ops.obs_compensate(weight, inverse[:1].repeat(4, 1, 1), pruned))


def test_compensation_of_a_broken_block_is_nan_there_alone():
    inverse = torch.eye(3).repeat(2, 1, 1)
    inverse[1, 0, 1] = torch.nan
    inverse[1, 1, 0] = torch.nan
    moved = ops.obs_compensate(torch.ones(2, 3), inverse, torch.tensor([[True, True, False]]).expand(2, 3))
    assert torch.equal(moved[0], torch.tensor([0.0, 0.0, 1.0]))
    assert moved[1, 2].isnan()


def test_compensation_of_half_precision_weights(fisher, generator):
    weight, inverse, _ = problem(fisher, generator, 2, 8, dtype=torch.float32)
    pruned = torch.rand(2, 8, generator=generator) < 0.5
    moved = ops.obs_compensate(weight.bfloat16(), inverse, pruned)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, ops.obs_compensate(weight.bfloat16().float(), inverse, pruned).bfloat16())


def test_compensation_of_nothing():
    assert ops.obs_compensate(torch.ones(0, 4), torch.ones(0, 4, 4), torch.ones(0, 4, dtype=torch.bool)).shape == (0, 4)
