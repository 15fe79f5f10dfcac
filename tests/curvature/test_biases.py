"""A layer's bias moves with its weight and is never lost."""

import copy

import pytest
import torch
from oracles import batches, kronecker_matrix, naive_elimination, rows_of, trained, with_estimate
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import Adam, Estimate, FishLeg, Kronecker
from fishleg_ext.curvature.fishleg import FishLegEstimate
from fishleg_ext.observation.types import Observation
from fishleg_ext.observation.unfold import conv_rows
from fishleg_ext.pruning.compensation import exact_update, simultaneous_update
from fishleg_ext.pruning.fixed_order import fixed_order_prune
from fishleg_ext.pruning.saliency import exact_costs
from fishleg_ext.sparsity.parameters import biases_of

MODELS = {
    "fishleg": lambda: FishLeg(0.05, batch_size=16),
    "fishleg, dense rows": lambda: FishLeg(0.05, batch_size=16, structure="kronecker"),
    "fishleg, scaled": lambda: FishLeg(0.05, batch_size=16, adam=Adam(steps=4, warm_up=32)),
    "gradient factors": lambda: Kronecker(0.05, factors="gradients"),
}


@pytest.fixture
def gradients(generator):
    """Of a weight [3, 2, 2] and its bias, which go together."""
    weight = torch.randn(64, 3, 4, dtype=torch.float64, generator=generator)
    bias = weight.sum(2) + 0.3 * torch.randn(64, 3, dtype=torch.float64, generator=generator)
    return {"w": weight.reshape(64, 3, 2, 2), "b": bias}


@pytest.fixture(params=MODELS)
def curvature(request, gradients):
    model = MODELS[request.param]()
    model = model.start({"w": gradients["w"][0]}, {"w": "b"})
    for start in range(0, 64, 16):
        part = {name: g[start : start + 16] for name, g in gradients.items()}
        model.update(Observation(16, gradients=part))
    return model


def dense_rows(curvature):
    """The inverse as [3, 5, 3, 5], the bias the last column."""
    factors = curvature.factors("w")
    dense = kronecker_matrix(*factors)
    return dense.reshape(len(factors.row), len(factors.col), len(factors.row), len(factors.col))


def test_products_and_the_diagonal_are_those_of_weight_and_bias_together(curvature, generator):
    dense = dense_rows(curvature)
    assert dense.shape == (3, 5, 3, 5)
    v = {"w": torch.randn(3, 2, 2, dtype=torch.float64, generator=generator), "b": torch.ones(3, dtype=torch.float64)}
    x = torch.cat([v["w"].reshape(3, 4), v["b"][:, None]], 1)
    expected = torch.einsum("oipj,pj->oi", dense, x)
    got = curvature.mul(v)
    torch.testing.assert_close(got["w"], expected[:, :4].reshape(3, 2, 2))
    torch.testing.assert_close(got["b"], expected[:, 4])
    torch.testing.assert_close(
        curvature.mul({"w": v["w"]})["b"], torch.einsum("opj,pj->o", dense[:, 4, :, :4], x[:, :4])
    )
    diagonal = torch.einsum("oioi->oi", dense)[:, :4]
    assert list(curvature.diag()) == ["w"]
    torch.testing.assert_close(curvature.diag()["w"], diagonal.reshape(3, 2, 2))
    fisher = torch.linalg.inv(dense.reshape(15, 15)).diagonal().reshape(3, 5)[:, :4]
    torch.testing.assert_close(curvature.fisher_diag()["w"].reshape(3, 4), fisher, rtol=1e-8, atol=0)
    if curvature.factors("w").row.dim() == 1:  # rows that do not compensate for each other
        torch.testing.assert_close(Estimate.fisher_diag(curvature)["w"].reshape(3, 4), fisher, rtol=1e-8, atol=0)


def test_elimination_leaves_the_bias_free(curvature, generator):
    weight = torch.randn(3, 2, 2, dtype=torch.float64, generator=generator)
    alive = torch.ones(3, 2, 2, dtype=torch.bool)
    costs = exact_costs(curvature, {"w": weight}, {"w": alive})["w"]
    dense = dense_rows(curvature)
    for row in range(3):
        inverse = dense[row, :4, row, :4]
        order, expected = naive_elimination(weight[row].flatten(), inverse, alive[row].flatten())
        assert costs.rank[row].argsort().tolist() == order
        torch.testing.assert_close(costs.cost[row, order], torch.tensor(expected, dtype=torch.float64))


def test_the_update_is_the_best_joint_one(curvature, generator):
    """dw = -Q[:, P] Q[P, P]^-1 w_P of each row, bias and all, whatever the bias is."""
    weight = torch.randn(3, 2, 2, dtype=torch.float64, generator=generator)
    kept = torch.rand(3, 2, 2, generator=generator) < 0.5
    bias = torch.randn(3, dtype=torch.float64, generator=generator)
    moved = exact_update(curvature, {"w": weight}, {"w": kept}, {"w": bias})
    dense = dense_rows(curvature)
    for row in range(3):
        gone = (~kept[row]).flatten().nonzero()[:, 0]
        inverse = dense[row, :, row, :]
        step = inverse[:, gone] @ torch.linalg.solve(inverse[gone][:, gone], weight[row].flatten()[gone])
        torch.testing.assert_close(moved["w"][row].flatten(), weight[row].flatten() - step[:4])
        torch.testing.assert_close(moved["b"][row], bias[row] - step[4])
    assert (moved["w"][~kept] == 0).all()


def test_the_cost_of_a_step_is_that_of_weight_and_bias_together(curvature, generator):
    step = {
        "w": torch.randn(3, 2, 2, dtype=torch.float64, generator=generator),
        "b": torch.randn(3, dtype=torch.float64, generator=generator),
    }
    flat = torch.cat([step["w"].reshape(3, 4), step["b"][:, None]], dim=1).flatten()
    expected = 0.5 * flat @ torch.linalg.solve(dense_rows(curvature).reshape(15, 15), flat)
    assert curvature.step_cost(step) == pytest.approx(float(expected), rel=1e-5)


def test_single_weight_updates_and_the_fixed_order_move_it_too(curvature, generator):
    weight = torch.randn(3, 2, 2, dtype=torch.float64, generator=generator)
    bias = torch.zeros(3, dtype=torch.float64)
    kept = torch.ones(3, 2, 2, dtype=torch.bool)
    kept[1, 0, 1] = False
    dense = dense_rows(curvature)
    moved = simultaneous_update(curvature, {"w": weight}, {"w": kept}, {"w": bias})
    torch.testing.assert_close(moved["b"], -dense[:, 4, 1, 1] * weight[1, 0, 1] / dense[1, 1, 1, 1])
    # Of all of a row's weights none is left to make up for them but the bias: any order is the same.
    everything, best = torch.zeros(3, 2, 2, dtype=torch.bool), None
    best = exact_update(curvature, {"w": weight}, {"w": everything}, {"w": bias})
    masks, moved = fixed_order_prune(curvature, {"w": weight}, {"w": kept | True}, {"w": 12}, {"w": bias})
    assert not masks["w"].any()
    torch.testing.assert_close(moved["b"], best["b"])
    assert moved["b"].all()


def test_layer_inputs_have_a_column_of_ones(generator):
    layer = nn.Conv2d(4, 2, 2, groups=2).double()
    x = torch.randn(6, 4, 3, 3, dtype=torch.float64, generator=generator)
    model = Kronecker(0.1, structure="kronecker")
    model = model.start({"w": layer.weight}, {"w": "b"})
    rows = conv_rows(x, kernel=(2, 2), groups=2, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    model.update(Observation(6, inputs={"w": rows_of(rows, 2)}))  # [2, rows, 8]
    model.update(Observation(0, output_gradients={"w": rows_of(torch.ones(2, 24, 1, dtype=torch.float64), 2)}))
    both = torch.cat([rows, torch.ones(2, 24, 1, dtype=torch.float64)], 2)
    expected = torch.einsum("gri,grj->ij", both, both) / 2
    torch.testing.assert_close(model.state_dict()["col"]["w"], expected)


def test_which_biases_go_with_which_weights():
    net = nn.Module()
    net.plain, net.without = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    net.one, net.other = nn.Linear(2, 2), nn.Linear(2, 2)
    net.other.bias = net.one.bias
    net.first, net.second = nn.Linear(2, 2), nn.Linear(2, 2)
    net.second.weight = net.first.weight
    net.norm, net.deep = nn.LayerNorm(2), nn.Sequential(nn.Conv1d(2, 2, 1))
    weights = {name: p for name, p in net.named_parameters() if name.endswith("weight")}
    assert biases_of(net, weights) == {"plain.weight": "plain.bias", "deep.0.weight": "deep.0.bias"}
    assert biases_of(net, dict(net.named_parameters())) == {}  # which are pruned themselves


@pytest.fixture
def problem(generator):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv1d(2, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(256, 2, 8, generator=generator) + 1
    y = (x.flatten(1) @ torch.randn(16, 3, generator=generator)).argmax(1)
    return trained(net, x, y), x, y


def changed_biases(before, after):
    old = dict(before.named_parameters())
    return [n for n, p in after.named_parameters() if n.endswith("bias") and not torch.equal(p, old[n])]


@pytest.mark.parametrize(
    "options",
    [
        {"curvature": "fishleg"},
        {"curvature": "kronecker"},
        {"curvature": FishLeg(structure={"3.weight": "block"})},
        {"curvature": "fishleg", "saliency": "simultaneous"},
        {"curvature": "fishleg", "saliency": "fixed_order"},
        {"curvature": "kronecker", "max_memory": 500_000},
        {"curvature": "layerwise", "allocation": "fishleg"},
        {"curvature": "block"},
    ],
)
def test_pruning_moves_the_biases_that_its_curvature_knows(options, problem):
    net, x, y = problem
    model = copy.deepcopy(net)
    scope = None if "allocation" in options else "layer"
    result = prune(model, batches(x, y), sparsity=0.5, scope=scope, num_grads=256, progress=False, **options)
    assert list(result.masks) == ["0.weight", "3.weight", "5.weight"]
    expected = ["0.bias", "3.bias", "5.bias"]
    if isinstance(options["curvature"], FishLeg):
        expected.remove("3.bias")
    assert changed_biases(net, model) == (expected if options["curvature"] not in ("block", "layerwise") else [])


def test_a_bias_that_may_move_makes_up_for_more(problem):
    net, x, y = problem
    losses = []
    for known in (True, False):
        model = copy.deepcopy(net)
        pruner = Pruner(model, curvature="fishleg", num_grads=256, progress=False)
        if not known:
            pruner.estimator.known_biases = {}
        pruner.estimate(batches(x, y), F.cross_entropy)
        pruner.prune_to(0.5)
        losses.append(float(F.cross_entropy(model(x), y).detach()))
    assert losses[0] < losses[1]


def test_a_bias_of_wider_dtype_keeps_its_digits(problem):
    """Its change is that of the same network in float32 to the digits of a bfloat16 weight, not to those of its own."""
    net, x, y = problem
    net = nn.Sequential(net[0], net[1], net[2], net[3])
    narrow = copy.deepcopy(net)
    narrow[3].weight.data = narrow[3].weight.data.bfloat16()
    narrow[3].forward = lambda x: F.linear(x, narrow[3].weight.float(), narrow[3].bias)
    options = {"sparsity": 0.3, "params": "3.weight", "curvature": "fishleg", "num_grads": 64, "progress": False}
    prune(narrow, batches(x, y), **options)
    assert narrow[3].weight.dtype == torch.bfloat16
    assert narrow[3].bias.dtype == torch.float32
    change = narrow[3].bias - net[3].bias
    assert change.abs().min() > 0
    assert (narrow[3].bias != narrow[3].bias.bfloat16()).any()


def test_biases_are_restored_if_anything_is_raised(problem):
    net, x, y = problem
    model = copy.deepcopy(net)

    class Failing(FishLegEstimate):
        def blocks(self, name):
            if changed_biases(net, model):
                raise RuntimeError("half way")
            return super().blocks(name)

    with pytest.raises(RuntimeError, match="half way"):
        prune(
            model,
            batches(x, y),
            sparsity=0.5,
            curvature=with_estimate(FishLeg, Failing)(),
            num_grads=64,
            recomputations=2,
            progress=False,
        )
    for a, b in zip(net.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
