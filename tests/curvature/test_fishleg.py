"""What FishLeg learns, against dense float64."""

import copy

import pytest
import torch
from matplotlib.axes import Axes
from oracles import batches, kronecker_matrix, trained
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import BlockFisher, CurvatureError, DiagonalFisher, FishLeg, Kronecker, LossCurves
from fishleg_ext.observation.observe import observe
from fishleg_ext.observation.types import Observation


@pytest.fixture(scope="module")
def gradients():
    """Per-sample gradients of a small trained network, labels from the model: name -> [512, o, i], float64."""
    torch.manual_seed(0)
    x = torch.randn(512, 8, dtype=torch.float64)
    y = (x[:, :4] @ torch.randn(4, 5, dtype=torch.float64)).argmax(1)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    net = trained(net, x, y, 60, 0.02)
    seen = {}

    class Recorder:
        observes = frozenset({"gradients"})

        def update(self, observation):
            for name, g in observation.gradients.items():
                seen.setdefault(name, []).append(g)

    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    observe(net, batches(x, y), F.cross_entropy, Recorder(), weights, num_grads=512, labels="model")
    return {name: torch.cat(g) for name, g in seen.items()}


def learned(gradients, damping, passes=2, batch_size=16, chunk=16, structure="kronecker", **options):
    """All batches learned, `passes` times."""
    curvature = FishLeg(damping, passes, batch_size, structure, **options)
    curvature = curvature.start({name: g[0] for name, g in gradients.items()})
    for _ in range(passes):
        for start in range(0, len(next(iter(gradients.values()))), chunk):
            part = {name: g[start : start + chunk] for name, g in gradients.items()}
            curvature.update(Observation(len(next(iter(part.values()))), gradients=part))
    return curvature


def dense_q(curvature, name):
    return kronecker_matrix(*curvature.factors(name))


def dense_fisher(grads, damping):
    g = grads.flatten(1)
    return g.mT @ g / len(g) + damping * torch.eye(g.shape[1], dtype=g.dtype)


def auxiliary_loss(q, fisher):
    """E_u[1/2 u^T Q F Q u - u^T Q u] over u ~ N(0, I)."""
    return float(0.5 * (q @ fisher @ q).trace() - q.trace())


def test_the_loss_that_is_told_is_the_expectation_over_probes(gradients, generator):
    told = {}
    curvature = learned(gradients, 1e-2, monitor=lambda name, seen, loss: told.__setitem__(name, (seen, loss)))
    before = {name: dense_q(curvature, name) for name in gradients}
    last = {name: g[-16:] for name, g in gradients.items()}
    curvature.update(Observation(16, gradients=last))
    for name, grads in last.items():
        fisher = dense_fisher(grads, 1e-2)
        assert told[name][0] == 1040
        assert told[name][1] == pytest.approx(auxiliary_loss(before[name], fisher), rel=1e-9)
        u = torch.randn(40000, len(fisher), dtype=torch.float64, generator=generator)
        v = u @ before[name]
        samples = 0.5 * (v @ fisher * v).sum(1) - (u * v).sum(1)
        assert abs(samples.mean() - told[name][1]) < 4 * samples.std() / 200


def class_optimum(grads, damping, structure):
    """The least auxiliary loss of Q = P (x) M on these gradients: L-BFGS on the roots of its factors."""
    curvature = learned({"w": grads}, damping, passes=20, structure=structure)
    row, col, _ = curvature.factors("w")
    factors = row if row.dim() == 2 else row.diag(), col
    roots = [torch.linalg.cholesky(factor).contiguous().requires_grad_() for factor in factors]
    free = torch.eye(len(roots[0]), dtype=grads.dtype) if structure == "rows" else 1
    optimizer = torch.optim.LBFGS(roots, max_iter=2000, max_eval=4000, history_size=100, line_search_fn="strong_wolfe")
    scale = 1 / abs(auxiliary_loss(dense_q(curvature, "w"), dense_fisher(grads, damping)))

    def loss():
        optimizer.zero_grad()
        row, col = (root @ root.mT for root in (roots[0] * free, roots[1]))
        squares = (row @ grads @ col).square().sum() / len(grads) + damping * row.square().sum() * col.square().sum()
        value = scale * (0.5 * squares - row.trace() * col.trace())
        value.backward()
        return value

    optimizer.step(loss)
    return float(loss().detach()) / scale


@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(
    ("structure", "layer"), [("kronecker", "0.weight"), ("rows", "0.weight"), ("rows", "2.weight")]
)
def test_learning_comes_near_the_optimum_of_its_class(damping, structure, layer, gradients):
    """Of the loss on all gradients, from the closed form E[G G^T] (x) E[G^T G], at its best scale, to the optimum."""
    grads = {"w": gradients[layer]}
    fisher = dense_fisher(grads["w"], damping)
    closed = Kronecker(damping, factors="gradients", structure="kronecker")
    closed = closed.start({"w": grads["w"][0]})
    closed.update(Observation(len(grads["w"]), gradients=grads))
    row, col, _ = closed.factors("w")
    q = torch.kron(row.diagonal().diag() if structure == "rows" else row, col)
    start = -0.5 * float(q.trace() ** 2 / (q @ fisher @ q).trace())
    optimum = class_optimum(grads["w"], damping, structure)
    reached = [
        auxiliary_loss(dense_q(learned(grads, damping, passes, structure=structure), "w"), fisher) for passes in (2, 10)
    ]
    assert start > reached[0] > reached[1]
    assert -1e-6 < (reached[1] - optimum) / (start - optimum) < 0.05


@pytest.mark.parametrize("damping", [1e-6, 1e-4, 1e-2, 1.0])
def test_learning_lowers_the_loss_where_outputs_are_dependent(damping, gradients):
    """The gradients of a softmax layer sum to zero over its rows, so that F is singular and converges slowly."""
    grads = {"w": gradients["2.weight"]}
    fisher = dense_fisher(grads["w"], damping)
    identity = auxiliary_loss(torch.eye(len(fisher), dtype=fisher.dtype) / damping, fisher)
    least = -0.5 * float(torch.linalg.inv(fisher).trace())
    losses = [auxiliary_loss(dense_q(learned(grads, damping, passes), "w"), fisher) for passes in (1, 2, 10)]
    assert identity > losses[0] > losses[1] > losses[2] > least
    assert losses[2] < 0.65 * least


@pytest.mark.parametrize(("structure", "other"), [("block", BlockFisher(12, 1e-3)), ("diagonal", DiagonalFisher(1e-3))])
def test_blocks_and_diagonals_are_learned_exactly(structure, other, gradients):
    curvature = learned(gradients, 1e-3, structure=structure, block_size=12)
    other = other.start({name: g[0] for name, g in gradients.items()})
    other.update(Observation(512, gradients=gradients))
    for name, expected in other.diag().items():
        torch.testing.assert_close(curvature.diag()[name], expected)
        torch.testing.assert_close(curvature.blocks(name).inverse, other.blocks(name).inverse)


def test_gradients_wait_until_they_make_up_a_batch(gradients):
    whole = learned(gradients, 1e-3)
    for chunk in (1, 7, 12, 40):
        cut = learned(gradients, 1e-3, chunk=chunk)
        for name in gradients:
            torch.testing.assert_close(dense_q(cut, name), dense_q(whole, name))
    few = {name: g[:21] for name, g in gradients.items()}
    curvature = learned(few, 1e-3, passes=1)
    assert curvature.state_dict()["learned"]["0.weight"]["seen"] == 21
    by_batch = learned({name: g[:16] for name, g in gradients.items()}, 1e-3, passes=1)
    by_batch.update(Observation(5, gradients={name: g[16:21] for name, g in gradients.items()}))
    torch.testing.assert_close(dense_q(curvature, "2.weight"), dense_q(by_batch, "2.weight"))


def of_a_changed_network(gradients):
    """Ten times as large, and not quite of the same shape."""
    return {name: 10 * (g + 0.1 * g.roll(1, -1)) for name, g in gradients.items()}


def held_out_loss(curvature, name, grads, damping):
    return auxiliary_loss(dense_q(curvature, name), dense_fisher(grads[name], damping))


def test_what_was_learned_is_worth_many_gradients_after_the_network_has_changed(gradients):
    """One batch on top of the last estimate, against sixteen from nothing, by the loss on gradients of neither."""
    few, rest = ({name: g[part] for name, g in gradients.items()} for part in (slice(0, 256), slice(256, 512)))
    changed = of_a_changed_network(few)
    begun = {}
    for carry_over in (0, 256):
        told = []
        monitor = lambda *call, told=told: told.append(call)
        first = learned(few, 1e-3, passes=1, carry_over=carry_over, monitor=monitor)
        told.clear()
        curvature = first.recipe.start({name: g[0] for name, g in gradients.items()}, previous=first)
        begun[carry_over] = curvature
        curvature.update(Observation(16, gradients={name: g[:16] for name, g in changed.items()}))
        assert [seen for _, seen, _ in told] == [16, 16]
        assert carry_over or all(loss > 0 for _, _, loss in told)
    whole = learned(changed, 1e-3, passes=1)
    for name in gradients:
        fresh, carried, many = (
            held_out_loss(curvature, name, of_a_changed_network(rest), 1e-3) for curvature in (*begun.values(), whole)
        )
        assert carried - many < 0.01 * (fresh - many)


def test_how_much_the_last_estimate_counts_is_bounded(gradients):
    first, second = ({name: g[part] for name, g in gradients.items()} for part in (slice(0, 256), slice(256, 512)))
    whole = learned(second, 1e-3, passes=1)
    curvature = learned(first, 1e-3, passes=1, carry_over=1)
    curvature = curvature.recipe.start({name: g[0] for name, g in gradients.items()}, previous=curvature)
    for start in range(0, 256, 16):
        curvature.update(Observation(16, gradients={name: g[start : start + 16] for name, g in second.items()}))
    for name in gradients:
        torch.testing.assert_close(dense_q(curvature, name), dense_q(whole, name), rtol=0.2, atol=0.02 * 1e3)
    with pytest.raises(ValueError, match="carry_over >= 0, got -1"):
        FishLeg(carry_over=-1)


def test_the_structure_of_each_parameter():
    shapes = {
        "conv": (6, 4, 3, 3),
        "bias": (300,),
        "fc": (5, 40),
        "other": (5, 40),
        "wide": (2, 9000),
        "head": (9000, 2),
    }
    curvature = FishLeg(structure={"other": "diagonal"})
    curvature = curvature.start({name: torch.zeros(shape) for name, shape in shapes.items()})
    sizes = {name: layout.block_size for name, layout in curvature.layouts.items()}
    assert sizes == {"conv": 36, "bias": 128, "fc": 40, "other": 1, "wide": 128, "head": 2}


def test_structures_of_parameters_that_there_are_not_are_refused(problem):
    net, _, _ = problem
    with pytest.raises(ValueError, match="structure names 5.wieght, not among the parameters 0.weight, 2.weight"):
        Pruner(net, curvature=FishLeg(structure={"5.wieght": "diagonal"}))


@pytest.mark.parametrize("carry_over", [0, 512])
def test_curves_of_the_last_estimate_are_drawn(carry_over, gradients, tmp_path, monkeypatch):
    curves = LossCurves()
    curvature = learned(gradients, 1e-3, passes=1, monitor=curves, carry_over=carry_over)
    assert {name: len(losses) for name, losses in curves.losses.items()} == dict.fromkeys(gradients, 32)
    assert [seen for seen, _ in curves.losses["0.weight"]] == list(range(16, 513, 16))
    curvature = curvature.recipe.start({name: g[0] for name, g in gradients.items()}, previous=curvature)
    curvature.update(Observation(32, gradients={name: g[:32] for name, g in gradients.items()}))
    assert [seen for seen, _ in curves.losses["2.weight"][-3:]] == [512, 16, 32]
    drawn = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **how: (drawn.append((x, min(y))), plot(axes, x, y, **how)))
    curves.plot(tmp_path / "loss.svg")
    assert [x for x, _ in drawn] == [(16, 32)] * 2
    assert [abs(least) for _, least in drawn] == [1, 1]
    assert "<svg" in (tmp_path / "loss.svg").read_text()
    with pytest.raises(ValueError, match="expected losses to draw, got none"):
        LossCurves().plot(tmp_path / "none.svg")


def test_memory_is_that_of_two_factors_and_their_moments():
    weight = torch.zeros(64, 64, 3, 3)
    curvature = FishLeg()
    curvature = curvature.start({"w": weight})
    state = curvature.state_dict()["learned"]["w"]
    held = sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, torch.Tensor))
    assert held == 2 * (64 + 576**2) * 4 + 4
    assert curvature.recipe.state_bytes("w", weight, 2048) == held - 4 + 64 * weight.numel() * 4


def test_a_state_of_other_parameters_is_refused(gradients):
    curvature = learned(gradients, 1e-3, structure={"0.weight": "kronecker", "2.weight": "block"})
    state = curvature.state_dict()
    with pytest.raises(ValueError, match="expected curvature of"):
        learned(gradients, 1e-3).load_state_dict(state)
    with pytest.raises(ValueError, match="shape"):
        learned(gradients, 1e-3, structure={"2.weight": "block"}).load_state_dict(state)
    narrow = {name: g[:, :, :3] for name, g in gradients.items()}
    other = learned(narrow, 1e-3, structure={"0.weight": "kronecker", "2.weight": "block"})
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(state)


def test_what_is_not_finite_is_named():
    curvature = FishLeg(batch_size=2)
    curvature = curvature.start({"w": torch.zeros(2, 3)})
    curvature.update(Observation(2, gradients={"w": torch.full((2, 2, 3), torch.nan)}))
    with pytest.raises(CurvatureError, match="w: .*Kronecker factors cannot be inverted"):
        curvature.blocks("w")


# pruning with Kronecker-factored curvature


@pytest.fixture
def problem(generator):
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, 3),
    )
    x = torch.randn(256, 2, 4, 4, generator=generator)
    y = (x.flatten(1) @ torch.randn(32, 3, generator=generator)).argmax(1)
    return trained(net, x, y), x, y


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
def test_pruning_is_better_than_by_magnitude(curvature, problem):
    net, x, y = problem
    losses = {}
    for kind in (curvature, "identity"):
        model = copy.deepcopy(net)
        result = prune(model, batches(x, y), sparsity=0.5, curvature=kind, num_grads=256, progress=False)
        assert result.predicted_loss_increase > 0
        assert sum(int((~mask).sum()) for mask in result.masks.values()) == round(0.5 * (144 + 288 + 96))
        for name, mask in result.masks.items():
            assert (dict(model.named_parameters())[name][~mask] == 0).all()
        losses[kind] = float(F.cross_entropy(model(x), y).detach())
    assert losses[curvature] < losses["identity"]


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
def test_pruning_on_after_one_estimate_is_pruning_at_once(curvature, problem):
    """Elimination deals with the dead first, so that the inverse need not know them."""
    net, x, y = problem
    results = []
    for steps in ([0.5], [0.2, 0.35, 0.5]):
        model = copy.deepcopy(net).double()
        pruner = Pruner(model, curvature=curvature, num_grads=256, progress=False)
        pruner.estimate(batches(x.double(), y), F.cross_entropy)
        for sparsity in steps:
            result = pruner.prune_to(sparsity)
        results.append((result.masks, dict(model.named_parameters())))
    for name, mask in results[0][0].items():
        assert torch.equal(mask, results[1][0][name])
        torch.testing.assert_close(results[0][1][name], results[1][1][name], rtol=1e-6, atol=1e-8)


def test_single_weight_rounds_mask_the_scale(problem):
    """The second round is that of mask * Q * mask."""
    net, x, y = problem
    model = copy.deepcopy(net).double()
    pruner = Pruner(model, curvature="fishleg", saliency="simultaneous", num_grads=256, progress=False)
    for sparsity in (0.3, 0.5):
        pruner.estimate(batches(x.double(), y), F.cross_entropy)
        before, masks = {n: w.detach().clone() for n, w in pruner.weights.items()}, pruner.masks
        result = pruner.prune_to(sparsity)
    for name, weight in before.items():
        row, col, _ = pruner.curvature.factors(name)
        size = pruner.curvature.layouts[name].block_size  # without the column of the bias
        mask = masks[name].double().flatten()
        q = mask[:, None] * kronecker_matrix(row, col[:size, :size]) * mask
        gone, w = (masks[name] & ~result.masks[name]).flatten(), weight.flatten()
        expected = w - q[:, gone] @ (w / q.diagonal())[gone]
        torch.testing.assert_close(pruner.weights[name].detach().flatten(), expected * result.masks[name].flatten())


@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
def test_rounds_and_a_saved_estimate(curvature, problem, tmp_path):
    net, x, y = problem
    options = {"curvature": curvature, "num_grads": 256, "progress": False}
    models = [copy.deepcopy(net), copy.deepcopy(net)]
    pruners = [Pruner(model, **options) for model in models]
    for sparsity in (0.3, 0.6):
        pruners[0].estimate(batches(x, y), F.cross_entropy)
        torch.save(pruners[0].state_dict(), tmp_path / "state.pt")
        pruners[1].load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        results = [pruner.prune_to(sparsity) for pruner in pruners]
        for name, mask in results[0].masks.items():
            assert torch.equal(mask, results[1].masks[name])
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("curvature", "max_memory"), [("fishleg", 900_000), ("kronecker", 90_000)])
def test_a_bound_on_memory_changes_nothing(curvature, max_memory, problem):
    """With labels of the data: sampled ones depend on how many are drawn at a time."""
    net, x, y = problem
    net, data = net.double(), batches(x.double(), y)
    options = {"curvature": curvature, "num_grads": 256, "labels": "data", "progress": False}
    whole, split = (Pruner(copy.deepcopy(net), max_memory=bytes_, **options) for bytes_ in (None, max_memory))
    assert len(split.estimator.groups) > len(whole.estimator.groups)
    masks = []
    for pruner in (whole, split):
        pruner.estimate(data, F.cross_entropy)
        masks.append(pruner.prune_to(0.5).masks)
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name])


def test_data_that_can_be_read_once_cannot_be_learned_from_twice(problem):
    net, x, y = problem
    options = {"sparsity": 0.5, "num_grads": 256, "progress": False}
    with pytest.raises(ValueError, match="read again, as FishLeg learns in 2 passes"):
        prune(net, iter(batches(x, y)), curvature=FishLeg(passes=2), **options)
    prune(net, iter(batches(x, y)), curvature="fishleg", **options)


@pytest.mark.parametrize("params", [None, "unused.weight"])
def test_a_layer_without_gradients_is_named(params, problem):
    net, x, y = problem
    net.unused = nn.Linear(2, 2)
    data = batches(x, y)
    net.forward = nn.Sequential(*list(net)[:-1]).forward
    options = {"sparsity": 0.5, "num_grads": 256, "progress": False, "params": params}
    with pytest.raises(CurvatureError, match="unused.weight: its layer was not called"):
        prune(net, data, curvature="kronecker", **options)
    if params is None:
        assert not prune(net, data, curvature="fishleg", **options).masks["unused.weight"].any()


def test_factors_of_another_kind_are_refused():
    weights = {"w": torch.zeros(2, 3)}
    states = {kind: Kronecker(factors=kind).start(weights) for kind in ("layers", "gradients")}
    with pytest.raises(ValueError, match="state of Kronecker.factors='layers'"):
        states["layers"].load_state_dict(states["gradients"].state_dict())
    dense = Kronecker(structure="kronecker")
    dense = dense.start({"w": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match="structure='kronecker'.*, got that of 'rows'"):
        dense.load_state_dict(states["layers"].state_dict())
