"""Every curvature model against the dense matrix it stands for, in float64."""

import pytest
import torch
from oracles import assert_agrees_with_dense, kronecker_matrix, rows_of

from fishleg_ext import ops
from fishleg_ext.curvature import (
    BlockFisher,
    CurvatureError,
    DiagonalFisher,
    FishLeg,
    Identity,
    Kronecker,
    Layerwise,
    LayerwiseDiagonal,
    LowRankFisher,
    make_curvature,
)
from fishleg_ext.observation.types import Observation
from fishleg_ext.observation.unfold import conv_rows
from fishleg_ext.pruning.compensation import exact_update
from fishleg_ext.pruning.saliency import exact_costs

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 2, 2)}
DAMPING = 0.05
MODELS = {
    "identity": Identity,
    "diagonal": lambda: DiagonalFisher(DAMPING),
    "block": lambda: BlockFisher(4, DAMPING),
    "low_rank": lambda: LowRankFisher(4, DAMPING),
    "layerwise_diagonal": lambda: LayerwiseDiagonal(DAMPING),
    "layerwise": lambda: Layerwise(DAMPING),
    "kronecker": lambda: Kronecker(DAMPING, structure="kronecker"),
    "kronecker, gradients": lambda: Kronecker(DAMPING, factors="gradients", structure="kronecker"),
    "kronecker, rows": lambda: Kronecker(DAMPING, structure="rows"),
    "fishleg": lambda: FishLeg(DAMPING, batch_size=12, structure="kronecker"),
    "fishleg, rows": lambda: FishLeg(DAMPING, batch_size=12, structure="rows"),
    "fishleg, block": lambda: FishLeg(DAMPING, structure={"a": "block", "b": "block", "c": "diagonal"}, block_size=4),
}


@pytest.fixture
def gradients(generator):
    return {n: torch.randn(12, *s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}


def inputs_of(gradients):
    """Inputs [rows, fan-in] of layers with these weights."""
    return {n: matrices(gradients, n)[:, 0] for n in gradients}


def flat(tensors):
    return torch.cat([tensors[name].flatten() for name in SHAPES])


def matrices(gradients, name):
    """[m, o, i]; a parameter of one dimension is a row."""
    g = gradients[name]
    return g.flatten(1)[:, None] if g.dim() == 2 else g.flatten(2)


def kronecker_fisher(row, col, damping):
    """Both factors damped by the same share."""
    pi = (col.diagonal().mean() / row.diagonal().mean()).sqrt()
    eye = lambda m: torch.eye(len(m), dtype=m.dtype)
    return torch.kron(row + damping**0.5 / pi * eye(row), col + damping**0.5 * pi * eye(col))


def dense_fisher(kind, gradients):
    g = torch.cat([gradients[name].flatten(1) for name in SHAPES], dim=1)
    d = g.shape[1]
    full = g.mT @ g / len(g)
    eye = torch.eye(d, dtype=torch.float64)
    if kind in ("layerwise", "layerwise_diagonal"):
        moments = {n: x.mT @ x / len(x) for n, x in inputs_of(gradients).items()}
        if kind == "layerwise_diagonal":
            moments = {n: a.diagonal().diag() for n, a in moments.items()}
        damped = {n: a + DAMPING * a.diagonal().mean() * torch.eye(len(a), dtype=a.dtype) for n, a in moments.items()}
        return torch.block_diag(
            *(torch.kron(torch.eye(matrices(gradients, n).shape[1], dtype=torch.float64), a) for n, a in damped.items())
        )
    if kind in ("kronecker", "kronecker, rows"):
        moment = lambda x: x.mT @ x / len(x)
        rows = (lambda x: x) if kind == "kronecker" else (lambda x: x.diagonal().diag())
        xs = [matrices(gradients, n) for n in SHAPES]
        return torch.block_diag(*(kronecker_fisher(rows(moment(x[..., 0])), moment(x[:, 0]), DAMPING) for x in xs))
    if kind == "kronecker, gradients":
        parts = []
        for n in SHAPES:
            x = matrices(gradients, n)
            row, col = (x @ x.mT).mean(0), (x.mT @ x).mean(0)
            parts.append(kronecker_fisher(row, col / row.trace(), DAMPING))
        return torch.block_diag(*parts)
    if kind in ("fishleg", "fishleg, rows"):  # whose factors have tests of their own
        learned = estimated(kind, gradients)
        factors = [learned.factors(n) for n in SHAPES]
        return torch.block_diag(*(torch.linalg.inv(kronecker_matrix(*f)) for f in factors))
    if kind == "identity":
        return eye
    if kind == "diagonal":
        return full * eye + DAMPING * eye
    if kind == "low_rank":
        return full + DAMPING * eye
    block = torch.zeros(d, d, dtype=torch.bool)
    start = 0
    for name, shape in SHAPES.items():
        size, step = torch.Size(shape).numel(), 1 if kind == "fishleg, block" and name == "c" else 4
        for left in range(0, size, step):
            part = slice(start + left, start + min(left + step, size))
            block[part, part] = True
        start += size
    return full * block + DAMPING * eye


def estimated(kind, gradients, chunk=5, dtype=torch.float64):
    curvature = MODELS[kind]()
    curvature = curvature.start({n: torch.zeros(s, dtype=dtype) for n, s in SHAPES.items()})
    for start in range(0, 12, chunk):
        curvature.update(observation({n: g[start : start + chunk].to(dtype) for n, g in gradients.items()}, curvature))
    return curvature


def observation(gradients, curvature):
    if curvature.observes == {"inputs"}:
        inputs = {n: rows_of(x, matrices(gradients, n).shape[1]) for n, x in inputs_of(gradients).items()}
        return Observation(len(gradients["a"]), inputs=inputs)
    if "output_gradients" in curvature.observes:
        xs = {n: matrices(gradients, n) for n in SHAPES}
        inputs = {n: rows_of(x[:, 0], x.shape[1]) for n, x in xs.items()}
        outputs = {n: rows_of(x[..., 0], x.shape[1]) for n, x in xs.items()}
        return Observation(len(gradients["a"]), inputs=inputs, output_gradients=outputs)
    return Observation(len(gradients["a"]), gradients=gradients)


@pytest.mark.parametrize("kind", MODELS)
def test_every_answer_is_that_of_the_dense_matrix(kind, gradients, generator):
    assert_agrees_with_dense(estimated(kind, gradients), torch.linalg.inv(dense_fisher(kind, gradients)), generator)


@pytest.mark.parametrize("kind", MODELS)
def test_chunks_do_not_matter_and_a_recipe_forgets(kind, gradients):
    whole, parts = estimated(kind, gradients, 12), estimated(kind, gradients, 1)
    torch.testing.assert_close(flat(parts.diag()), flat(whole.diag()))
    parts = parts.recipe.start({n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()})
    parts.update(observation(gradients, parts))
    torch.testing.assert_close(flat(parts.diag()), flat(whole.diag()))


@pytest.mark.parametrize("kind", MODELS)
def test_state_survives(kind, gradients, tmp_path):
    curvature = estimated(kind, gradients)
    torch.save(curvature.state_dict(), tmp_path / "state.pt")
    again = MODELS[kind]()
    again = again.start({n: torch.zeros(s, dtype=torch.float64) for n, s in SHAPES.items()})
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(flat(again.diag()), flat(curvature.diag()))


def test_low_rank_keeps_its_accuracy_in_single_precision(gradients):
    """1 - |L^-1 g|^2 cancels: at cond(F) = 1e6 a float32 difference would keep no digit."""
    big = {n: 300 * g for n, g in gradients.items()}
    inverse = torch.linalg.inv(dense_fisher("low_rank", big))
    curvature = estimated("low_rank", big, dtype=torch.float32)
    torch.testing.assert_close(flat(curvature.diag()).double(), inverse.diagonal(), rtol=1e-3, atol=0)


def test_narrow_weights_are_accumulated_in_float32(gradients):
    curvature = estimated("block", gradients, dtype=torch.bfloat16)
    assert curvature.diag()["a"].dtype == torch.float32
    assert curvature.recipe.state_bytes("w", torch.zeros(8, dtype=torch.bfloat16), 1) == 2 * 16 * 4


def test_raised_damping_is_counted_and_told():
    curvature = BlockFisher(2, 0.0)
    curvature = curvature.start({"w": torch.zeros(4)})
    curvature.update(Observation(1, gradients={"w": torch.tensor([[1.0, 1.0, 0.5, 0.5]])}))
    with pytest.warns(UserWarning, match="w: 2 of 2 Fisher blocks are not positive definite"):
        curvature.diag()
    assert curvature.damping_raised == {"w": 2}
    curvature.diag()  # told once


def test_what_cannot_be_inverted_is_named():
    curvature = BlockFisher(2, 0.0)
    curvature = curvature.start({"w": torch.zeros(4)})
    with pytest.raises(CurvatureError, match="w: 2 of 2 Fisher blocks cannot be inverted"):
        curvature.diag()
    low_rank = LowRankFisher()
    low_rank = low_rank.start({"w": torch.zeros(4)})
    low_rank.update(Observation(1, gradients={"w": torch.full((1, 4), torch.nan)}))
    with pytest.raises(CurvatureError, match="low-rank Fisher of w"):
        low_rank.diag()


def test_names_and_arguments():
    assert isinstance(make_curvature("identity"), Identity)
    assert make_curvature("block", block_size=50, damping=1e-3).block_size == 50
    assert make_curvature("block").damping == 1e-5
    instance = BlockFisher()
    assert make_curvature(instance) == instance
    with pytest.raises(
        ValueError, match="damping=0.001 cannot be combined with a curvature instance.*set it on BlockFisher"
    ):
        make_curvature(instance, damping=1e-3)
    with pytest.raises(ValueError, match="got 'blocks'"):
        make_curvature("blocks")
    with pytest.raises(TypeError, match="a name or a Curvature"):
        make_curvature(BlockFisher)
    assert isinstance(make_curvature("kronecker", damping=1e-4), Kronecker)
    assert make_curvature("fishleg", block_size=50).block_size == 50
    for make in (
        lambda: BlockFisher(0),
        lambda: BlockFisher(damping=-1),
        lambda: LowRankFisher(damping=0),
        lambda: DiagonalFisher(0.0),
        lambda: Layerwise(0.0),
        lambda: Layerwise(inputs="pruned"),
        lambda: Kronecker(0.0),
        lambda: Kronecker(factors="inputs"),
        lambda: Kronecker(structure="block"),
        lambda: FishLeg(0.0),
        lambda: FishLeg(passes=0),
        lambda: FishLeg(structure="dense"),
        lambda: FishLeg(structure={"w": "dense"}),
    ):
        with pytest.raises(ValueError, match="expected"):
            make()


def test_low_rank_works_on_several_columns_at_a_time(gradients, generator, monkeypatch):
    v = {n: torch.randn(s, dtype=torch.float64, generator=generator) for n, s in SHAPES.items()}
    answers = []
    for columns in (8192, 6):
        monkeypatch.setattr("fishleg_ext.curvature.low_rank.COLUMNS", columns)
        model = estimated("low_rank", gradients)
        answers.append(
            [
                flat(model.mul(v)),
                flat(model.diag()),
                model.blocks("a").inverse,
                torch.tensor(model.step_cost(v)),
            ]
        )
    torch.testing.assert_close(answers[0], answers[1])


def test_padding_does_not_make_a_block_singular(generator):
    curvature = BlockFisher(4, 0.0)
    curvature = curvature.start({"w": torch.zeros(6, dtype=torch.float64)})
    grads = torch.randn(50, 6, dtype=torch.float64, generator=generator)
    curvature.update(Observation(50, gradients={"w": grads}))
    expected = torch.linalg.inv(grads[:, 4:].mT @ grads[:, 4:] / 50)
    torch.testing.assert_close(curvature.blocks("w").inverse[1, :2, :2], expected)
    assert not curvature.damping_raised


def test_low_rank_forgets_what_it_derived_from_fewer_gradients(gradients):
    model = estimated("low_rank", {n: g[:6] for n, g in gradients.items()}, chunk=6)
    model.diag()
    model.update(Observation(6, gradients={n: g[6:] for n, g in gradients.items()}))
    torch.testing.assert_close(flat(model.diag()), flat(estimated("low_rank", gradients).diag()))


def test_groups_of_a_convolution_have_inputs_of_their_own(generator):
    conv = torch.nn.Conv2d(4, 6, 3, groups=2, bias=False).double()
    x = torch.randn(20, 4, 6, 6, dtype=torch.float64, generator=generator)
    curvature = Layerwise(1e-3)
    curvature = curvature.start({"weight": conv.weight.detach()})
    rows = conv_rows(x, kernel=(3, 3), groups=2, stride=(1, 1), padding=((0, 0), (0, 0)), dilation=(1, 1))
    curvature.update(Observation(20, inputs={"weight": rows_of(rows, 6)}))
    v = torch.randn(conv.weight.shape, dtype=torch.float64, generator=generator)
    for group in range(2):
        patches = torch.nn.functional.unfold(x[:, 2 * group : 2 * group + 2], 3)  # [N, 18, positions]
        moment = torch.einsum("nip,njp->ij", patches, patches) / 20
        inverse = torch.linalg.inv(moment + 1e-3 * moment.diagonal().mean() * torch.eye(18))
        mine = slice(3 * group, 3 * group + 3)
        torch.testing.assert_close(
            curvature.mul({"weight": v})["weight"][mine].flatten(1), v[mine].flatten(1) @ inverse
        )
        torch.testing.assert_close(curvature.diag()["weight"][mine].flatten(1)[1], inverse.diagonal())
        torch.testing.assert_close(curvature.blocks("weight").inverse[mine][2], inverse)


def test_a_layer_that_is_not_called_is_named():
    curvature = Layerwise()
    curvature = curvature.start({"w": torch.zeros(2, 3)})
    with pytest.raises(CurvatureError, match="w: its layer was not called"):
        curvature.blocks("w")


def test_inputs_that_are_always_zero_make_weights_cheap_and_nothing_singular():
    curvature = Layerwise()
    curvature = curvature.start({"w": torch.zeros(2, 3)})
    curvature.update(Observation(4, inputs={"w": rows_of(torch.eye(4, 3) * torch.tensor([1.0, 0.0, 2.0]), 2)}))
    diagonal = curvature.diag()["w"]
    assert diagonal.isfinite().all()
    assert (diagonal.argmax(1) == 1).all()
    curvature = curvature.recipe.start({"w": torch.zeros(2, 3)})
    curvature.update(Observation(4, inputs={"w": rows_of(torch.zeros(4, 3), 2)}))
    assert curvature.diag()["w"].isfinite().all()


def test_a_state_of_low_rank_outlives_what_is_asked_of_the_estimate_later(gradients):
    model = estimated("low_rank", gradients)
    state = model.state_dict()
    expected = flat(model.diag())
    again = LowRankFisher(4, DAMPING).start({n: g[0] for n, g in gradients.items()})
    again.load_state_dict(state)
    torch.testing.assert_close(flat(again.diag()), expected)
    whitened = LowRankFisher(4, DAMPING).start({n: g[0] for n, g in gradients.items()})
    whitened.load_state_dict(model.state_dict())
    half = {n: g[:6] for n, g in gradients.items()}
    for each in (model, whitened):  # whose gradients are there again
        each.update(Observation(6, gradients=half))
        twice = LowRankFisher(4, DAMPING).start({n: g[0] for n, g in gradients.items()})
        twice.update(Observation(18, gradients={n: torch.cat([g, half[n]]) for n, g in gradients.items()}))
        torch.testing.assert_close(flat(each.diag()), flat(twice.diag()))
    assert LowRankFisher().start({"w": torch.zeros(4)}).step_cost({}) == 0


def test_what_failed_is_not_kept():
    curvature = BlockFisher(2, 0.0).start({"w": torch.zeros(4)})
    curvature.keep_bytes = 2**20
    for _ in range(2):
        with pytest.raises(CurvatureError, match="cannot be inverted"), curvature.checking_later():
            curvature.blocks("w")


def test_inverses_are_kept_where_there_is_room(gradients, monkeypatch):
    model = estimated("block", gradients)
    inverted = []
    invert = ops.block_inverse
    monkeypatch.setattr(ops, "block_inverse", lambda *call: (inverted.append(1), invert(*call))[1])
    for room, expected in ((0, 2), (2**20, 1)):
        model.keep_bytes = room
        inverted.clear()
        first, second = model.blocks("a").inverse, model.blocks("a").inverse
        assert len(inverted) == expected
        assert torch.equal(first, second)
    model.update(Observation(6, gradients={n: g[:6] for n, g in gradients.items()}))
    assert not torch.equal(model.blocks("a").inverse, first)
    model.forget_kept()
    model.blocks("a")
    assert len(inverted) == 3


def test_low_rank_whitens_some_rows_at_a_time(gradients, monkeypatch):
    expected = flat(estimated("low_rank", gradients).diag())
    monkeypatch.setattr("fishleg_ext.curvature.low_rank.ROWS", 3)
    torch.testing.assert_close(flat(estimated("low_rank", gradients).diag()), expected)


@pytest.mark.parametrize("kind", ["block", "diagonal", "low_rank"])
def test_a_weight_without_dimensions(kind):
    gradients = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    estimate = make_curvature(kind, damping=0.5).start({"w": torch.tensor(1.0, dtype=torch.float64)})
    estimate.update(Observation(3, gradients={"w": gradients}))
    assert float(estimate.diag()["w"]) == pytest.approx(1 / (14 / 3 + 0.5))


def test_some_blocks_at_a_time_answer_as_all_at_once(generator, monkeypatch):
    """Three blocks of which the second needs more damping; what raised it is counted over all parts."""
    weights = {"w": torch.randn(2, 6, dtype=torch.float64, generator=generator)}
    gradients = torch.randn(30, 2, 6, dtype=torch.float64, generator=generator)
    gradients[:, 0, 5], gradients[:, 1, :2] = 0, 0
    masks = {"w": torch.rand(2, 6, generator=generator) < 0.5}
    answers = []
    for part_bytes in (1, 2**20):
        monkeypatch.setattr("fishleg_ext.curvature.block.CACHE_BYTES", part_bytes)
        estimate = BlockFisher(4, 0.0).start(weights)
        estimate.update(Observation(30, gradients={"w": gradients}))
        with pytest.warns(UserWarning, match="1 of 3 Fisher blocks"), estimate.checking_later():
            costs = exact_costs(estimate, weights, {"w": torch.ones(2, 6, dtype=torch.bool)})["w"]
        assert estimate.damping_raised == {"w": 1}
        updated = exact_update(estimate, weights, masks)
        answers.append([costs.rank, costs.cost, updated["w"], estimate.diag()["w"], estimate.mul(weights)["w"]])
        assert len(list(estimate.blocks_at_a_time("w"))) == (3 if part_bytes == 1 else 1)
    torch.testing.assert_close(answers[0], answers[1])


def test_a_block_of_some_that_has_no_inverse_is_told(monkeypatch):
    monkeypatch.setattr("fishleg_ext.curvature.block.CACHE_BYTES", 1)
    estimate = BlockFisher(2, 0.0).start({"w": torch.zeros(6)})
    gradients = torch.randn(9, 6)
    gradients[:, 2:4] = 0
    estimate.update(Observation(9, gradients={"w": gradients}))
    with pytest.raises(CurvatureError, match="w: 1 of 3 Fisher blocks cannot be inverted"):
        exact_update(estimate, {"w": torch.ones(6)}, {"w": torch.zeros(6, dtype=torch.bool)})
