"""Saliency, selection and compensation between a curvature model and masks."""

import pytest
import torch
from oracles import cholesky_inverse, rows_of, usable
from torch import nn

from fishleg_ext import Pruner, ops
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.curvature import BlockFisher, Blocks, Identity, make_curvature
from fishleg_ext.curvature.block import BlockEstimate
from fishleg_ext.observation.types import Observation
from fishleg_ext.pruning.compensation import exact_update, simultaneous_update
from fishleg_ext.pruning.costs import Costs, total_cost
from fishleg_ext.pruning.saliency import exact_costs, simultaneous_costs
from fishleg_ext.pruning.selection import keep_of_rows, select

SHAPES = {"a": (5, 9), "b": (3, 7)}


@pytest.fixture
def weights(generator):
    return {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}


@pytest.fixture
def masks(generator):
    return {n: torch.rand(s, generator=generator) < 0.8 for n, s in SHAPES.items()}


@pytest.fixture
def curvature(generator, weights, masks):
    model = BlockFisher(8, 1e-2)
    model = model.start(weights)
    grads = {n: masks[n] * torch.randn(40, *s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}
    model.update(Observation(40, gradients=grads))
    return model


def alive_weights(weights, masks):
    return {n: w * masks[n] for n, w in weights.items()}


@pytest.mark.parametrize("target", [20, 40, 65])
def test_a_prefix_of_every_blocks_order_goes(curvature, weights, masks, target):
    weights = alive_weights(weights, masks)
    costs = exact_costs(curvature, weights, masks)
    kept = select(costs, target)
    assert sum(int((~m).sum()) for m in kept.values()) == target
    for name, c in costs.items():
        gone = ~c.layout.to_blocks(kept[name]) & c.layout.is_weight(torch.device("cpu"))
        assert (gone | c.alive | ~c.layout.is_weight(torch.device("cpu"))).all()  # the dead stay dead
        newly = gone & c.alive
        for k in range(c.layout.num_blocks):
            assert sorted(c.rank[k][newly[k]].tolist()) == list(range(int(newly[k].sum())))


def test_equal_costs_everywhere_still_give_prefixes_and_the_exact_count():
    layout = BlockLayout((7, 5), 8)
    rank = torch.stack([torch.randperm(8) for _ in range(5)]).to(torch.int32)
    is_weight = layout.is_weight(torch.device("cpu"))
    rank = torch.where(is_weight, rank, -1)
    rank[4, is_weight[4]] = torch.randperm(3).to(torch.int32)
    costs = {"w": Costs(layout, torch.where(is_weight, 1.0, torch.inf), is_weight, rank)}
    for target in range(36):
        gone = ~layout.to_blocks(select(costs, target)["w"]) & is_weight
        assert int(gone.sum()) == target
        for k in range(5):
            assert sorted(rank[k][gone[k]].tolist()) == list(range(int(gone[k].sum())))


def test_weights_never_reached_go_last_but_before_padding():
    layout = BlockLayout((5,), 4)
    is_weight = layout.is_weight(torch.device("cpu"))
    rank = torch.tensor([[0, 4, 1, 4], [0, -1, -1, -1]], dtype=torch.int32)
    cost = torch.tensor([[3.0, torch.inf, 1.0, torch.inf], [2.0] + 3 * [torch.inf]])
    costs = {"w": Costs(layout, cost, is_weight, rank)}
    assert select(costs, 3)["w"].tolist() == [False, True, False, True, False]
    assert select(costs, 5)["w"].tolist() == [False] * 5


def test_selection_by_layer_counts_each(curvature, weights, masks):
    costs = exact_costs(curvature, alive_weights(weights, masks), masks)
    kept = select(costs, {"a": 30, "b": 10})
    assert int((~kept["a"]).sum()) == 30
    assert int((~kept["b"]).sum()) == 10


def test_costs_of_the_selected_add_up_to_the_cost_of_the_step(curvature, weights, masks):
    weights = alive_weights(weights, masks)
    costs = exact_costs(curvature, weights, masks)
    kept = select(costs, 50)
    moved = exact_update(curvature, weights, kept)
    step = {name: moved[name] - weight for name, weight in weights.items()}
    assert total_cost(costs, kept) == pytest.approx(curvature.step_cost(step), rel=1e-8)


def test_exact_with_the_identity_is_magnitude(weights, masks):
    identity = Identity()
    identity = identity.start(weights)
    exact = select(exact_costs(identity, weights, masks), 50)
    simultaneous = select(simultaneous_costs(identity, weights, masks), 50)
    scores = [torch.where(masks[n], w.square(), -torch.inf) for n, w in weights.items()]
    for i, name in enumerate(weights):
        assert torch.equal(exact[name], simultaneous[name])
        assert torch.equal(exact[name], ops.keep_mask(scores, 50)[i])
    updated = exact_update(identity, weights, exact)
    assert all(torch.equal(updated[n], weights[n] * exact[n]) for n in weights)


def test_exact_update_is_block_compensation(curvature, weights, masks):
    weights = alive_weights(weights, masks)
    kept = select(exact_costs(curvature, weights, masks), 40)
    updated = exact_update(curvature, weights, kept)
    for name, w in updated.items():
        layout = curvature.layouts[name]
        want = ops.obs_compensate(
            layout.to_blocks(weights[name]),
            curvature.blocks(name).inverse,
            layout.to_blocks(~kept[name]),
        )
        assert torch.equal(w, layout.from_blocks(want))
        assert not w[~kept[name]].any()


def test_simultaneous_update_is_the_sum_of_single_updates(curvature, weights, masks):
    weights = alive_weights(weights, masks)
    kept = select(simultaneous_costs(curvature, weights, masks), 40)
    updated = simultaneous_update(curvature, weights, kept)
    for name in weights:
        layout = curvature.layouts[name]
        inverse = torch.block_diag(*curvature.blocks(name).inverse)
        w = layout.to_blocks(weights[name]).flatten()
        gone = layout.to_blocks(~kept[name]).flatten()
        want = w - inverse[:, gone] @ (w / inverse.diagonal())[gone]
        want[gone] = 0
        torch.testing.assert_close(updated[name], layout.from_blocks(want.reshape(layout.num_blocks, -1)))


class Scaled(BlockEstimate):
    """Q = D_r P_rr M D_r in row r: one inverse M for all rows, scales D, costs over P_rr."""

    def __init__(self, weights, shared, scale, row_factor):
        super().__init__(BlockFisher(shared.shape[-1]), weights)
        self.given = Blocks(shared, scale, 1 / row_factor[:, None])

    def blocks(self, name):
        return self.given


def test_scales_of_rows_that_share_an_inverse(fisher, generator):
    shared = cholesky_inverse(fisher(1, 6))
    scale = torch.rand(4, 6, dtype=torch.float64, generator=generator) + 0.1
    row_factor = torch.rand(4, dtype=torch.float64, generator=generator) + 0.1
    weights = {"w": torch.randn(4, 6, dtype=torch.float64, generator=generator)}
    masks = {"w": torch.ones(4, 6, dtype=torch.bool)}
    scaled = Scaled(weights, shared, scale, row_factor)
    dense = row_factor[:, None, None] * scale[:, :, None] * shared * scale[:, None, :]
    costs = exact_costs(scaled, weights, masks)["w"]
    rank, cost = ops.obs_eliminate(weights["w"], dense, masks["w"])
    assert torch.equal(costs.rank, rank)
    torch.testing.assert_close(costs.cost, cost)
    kept = {"w": rank >= 3}
    torch.testing.assert_close(
        exact_update(scaled, weights, kept)["w"], ops.obs_compensate(weights["w"], dense, rank < 3)
    )


def test_a_zero_scale_masks_a_weight_out():
    blocks = Blocks(torch.eye(2)[None], torch.tensor([[0.0, 2.0]]))
    assert blocks.scaled(torch.tensor([[3.0, 4.0]])).tolist() == [[0, 2]]
    assert blocks.unscaled(torch.tensor([[0.0, 2.0]])).tolist() == [[0, 4]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["layerwise", "block", "fishleg"])
def test_narrow_weights_are_compensated_in_float32_and_rounded_once(kind, dtype, generator):
    """So that each is the float64 result, rounded, but for what lies between two numbers of the dtype."""
    x = torch.randn(200, 12, generator=generator).to(dtype)
    weight = torch.randn(5, 12, generator=generator).to(dtype)
    gradients = torch.randn(200, 5, 1, generator=generator).to(dtype) * x[:, None]
    masks = {"w": torch.rand(5, 12, generator=generator) < 0.4}
    narrow, wide = weight, weight.double()
    moved = []
    for given in (narrow, wide):
        estimate = make_curvature(kind).start({"w": given})
        observed = {"inputs": {"w": rows_of(x.to(given.dtype), 5)}} if kind == "layerwise" else {}
        own = {} if observed else {"gradients": {"w": gradients.to(given.dtype)}}
        estimate.update(Observation(200, **observed, **own))
        moved.append(exact_update(estimate, {"w": given}, masks)["w"])
    assert moved[0].dtype == dtype
    assert torch.equal(moved[0] != 0, masks["w"])
    assert not torch.equal(moved[0], torch.where(masks["w"], weight, 0))  # the kept have moved
    error = (moved[0].double() - moved[1]).abs()
    half_ulp = torch.finfo(dtype).eps / 2 * moved[1].abs()
    assert (error <= 1.01 * half_ulp + 1e-4 * moved[1].abs().max()).all()


def rows_by_hand(score, count):
    """Take the lowest of each row in turn, a weight of every row before another of any; of the last the cheapest."""
    orders = [sorted((x, j) for j, x in enumerate(row) if not torch.isnan(torch.tensor(x))) for row in score.tolist()]
    taken = [sum(x == -torch.inf for x, _ in order) for order in orders]
    while sum(taken) < count:
        least = min(t for t, order in zip(taken, orders, strict=True) if t < len(order))
        open_rows = [r for r, t in enumerate(taken) if t == least and t < len(orders[r])]
        taken[min(open_rows, key=lambda r: (orders[r][taken[r]][0], r))] += 1
    kept = torch.ones(score.shape, dtype=torch.bool)
    for r, t in enumerate(taken):
        kept[r, [j for _, j in orders[r][:t]]] = False
    return kept


@pytest.mark.parametrize("count", [0, 1, 7, 13, 20, 28])
@pytest.mark.parametrize("kind", ["distinct", "ties", "dead", "must be kept"])
def test_rows_are_pruned_alike_and_the_cheapest_have_one_more(kind, count, generator):
    score = torch.rand(4, 7, generator=generator, dtype=torch.float64)
    if kind == "ties":
        score = (score * 3).round()
    if kind == "dead":
        score[1, :4] = -torch.inf
        count = max(count, 4)
    if kind == "must be kept":
        score[2, 1:6] = torch.nan
        count = min(count, 23)
    kept = keep_of_rows(score, count)
    assert torch.equal(kept, rows_by_hand(score, count))
    assert int((~kept).sum()) == count


@pytest.mark.parametrize("curvature", ["layerwise", "layerwise_diagonal", "kronecker", "identity"])
@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_scope_row_prunes_each_output_alike_and_goes_on_from_earlier_masks(curvature, sparsity):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 4))
    data = [(torch.randn(40, 7), torch.randint(4, (40,)))]
    options = {"curvature": curvature} | usable(curvature=curvature, damping=1e-3, num_grads=40)
    pruner = Pruner(net, **options, scope="row", saliency="exact", progress=False)
    for target in (sparsity / 2, sparsity):
        pruner.estimate(data, nn.functional.cross_entropy)
        result = pruner.prune_to(target)
        for name, mask in result.masks.items():
            pruned = (~mask).sum(1)
            assert int(pruned.max() - pruned.min()) <= 1
            assert int(pruned.sum()) == round(target * mask.numel())
            assert (net.get_parameter(name)[~mask] == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"curvature": "block", "block_size": 4}, "divide the rows of 7 weights of weight with scope='row'"),
        ({"curvature": "layerwise", "saliency": "fixed_order"}, "cannot be combined with scope='row'"),
    ],
)
def test_scope_row_needs_weights_of_a_row_to_be_chosen_among(options, message):
    with pytest.raises(ValueError, match=message):
        Pruner(nn.Linear(7, 5), scope="row", **options)
