"""quantize; files and retraining are tested in quantization/."""

import copy
import json

import pytest
import torch
from oracles import batches
from small import assert_same, make_net, snapshot
from torch import nn
from torch.nn import functional as F

from fishleg_ext import QuantizedTensor, load_quantized, prune, quantize
from fishleg_ext.curvature import BlockFisher, CurvatureError, DiagonalFisher, Layerwise
from fishleg_ext.quantization.entropy import entropy
from fishleg_ext.quantization.fixed_point import fit_scale


def quantized(net, data, **options):
    return quantize(net, data, progress=False, num_grads=48, **options)


METHODS = {
    "codebook": {},
    "codebook by row": {"group": "row"},
    "codebook of 5 weights": {"group": 5},
    "plain k-means": {"curvature": "identity", "num_grads": None},
    "fixed_point": {"method": "fixed_point"},
    "fixed_point by row": {"method": "fixed_point", "group": "row"},
    "fixed_point, equal bits": {"method": "fixed_point", "allocate": False},
    "entropy": {"coding": "entropy"},
    "fixed_point, entropy": {"method": "fixed_point", "coding": "entropy"},
    "obq block": {"method": "obq", "curvature": "block"},
    "obq layerwise": {"method": "obq", "curvature": "layerwise"},
    "obq kronecker by row": {"method": "obq", "curvature": "kronecker", "group": "row"},
    "obq fishleg": {"method": "obq", "curvature": "fishleg"},
    "gptq": {"method": "obq", "curvature": "layerwise", "order": "given", "grid": "fixed_point", "group": "row"},
    "gptq fishleg": {"method": "obq", "curvature": "fishleg", "order": "given"},
    "obq entropy": {"method": "obq", "curvature": "block", "coding": "entropy"},
}


def weights_of(net):
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, masked, net, data, tmp_path):
    """Few values in each group, zeros that stay, a budget that is kept, and a file that gives the same to the bit."""
    options = {"num_grads": 48, "progress": False} | METHODS[method]
    masks = prune(net, data, sparsity=0.6, num_grads=48, progress=False).masks if masked else None
    before = copy.deepcopy(net)
    result = quantize(net, data, bits=3, masks=masks, **options)
    assert result.mean_bits <= 3
    for name, weight in weights_of(net).items():
        tensor = result.tensors[name]
        assert torch.equal(tensor.unpack(), weight)
        kept = torch.ones_like(weight, dtype=torch.bool) if masks is None else masks[name]
        dense = before.get_parameter(name)
        assert (weight - dense).norm() < 0.6 * dense.norm()
        assert not weight[~kept].any()
        groups = weight.flatten().split(tensor.group_size)
        most = result.bits[name].long()
        inside = kept.flatten().split(tensor.group_size)
        for group, mask, width in zip(groups, inside, most, strict=True):
            assert len(group[mask].unique()) <= 1 << int(width)
    for name, parameter in before.named_parameters():  # nothing else moves
        assert parameter.dim() > 1 or torch.equal(parameter, net.get_parameter(name))

    path = tmp_path / "net.safetensors"
    result.save(path)
    assert path.stat().st_size == result.size == sum(result.sizes().values())
    loaded = load_quantized(path, make_net())
    assert_same(snapshot(loaded), snapshot(net))
    x = data[0][0]
    assert torch.equal(loaded.eval()(x), net.eval()(x))
    packed = load_quantized(path)
    assert packed.keys() == net.state_dict().keys()
    for name, entry in packed.items():
        assert torch.equal(entry.unpack() if isinstance(entry, QuantizedTensor) else entry, net.state_dict()[name])


def test_distortion_is_that_of_the_curvature(net, data):
    """By a Fisher diagonal computed here, sample by sample."""
    before = copy.deepcopy(net)
    result = quantized(net, data, bits=2, curvature=DiagonalFisher(damping=1e-8, labels="data"))
    total, count, squares = 0.0, 0, {}
    for x, y in data:
        for i in range(len(x)):
            loss = F.cross_entropy(before.eval()(x[i : i + 1]), y[i : i + 1])
            gradients = torch.autograd.grad(loss, weights_of(before).values())
            for name, g in zip(weights_of(before), gradients, strict=True):
                squares[name] = squares.get(name, 0) + g.double() ** 2
            count += 1
    for name, weight in weights_of(net).items():
        step = weight.detach().double() - before.get_parameter(name).detach().double()
        total += float(0.5 * ((squares[name] / count + 1e-8) * step**2).sum())
    assert result.distortion == pytest.approx(total, rel=1e-4)


def test_obq_costs_what_the_move_costs(net, data):
    """Half the squared error of the outputs of a linear layer."""
    layer = nn.Linear(12, 5, bias=False)
    x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0))
    before = layer.weight.detach().clone()
    curvature = Layerwise(damping=1e-6, num_grads=64)
    options = {"method": "obq", "bits": 2, "progress": False}
    result = quantize(layer, [(x, torch.zeros(64, dtype=torch.long))], curvature=curvature, **options)
    error = (x @ (layer.weight.detach() - before).T).double()
    assert result.distortion == pytest.approx(float(0.5 * error.square().sum() / 64), rel=1e-3)
    rounded = nn.Linear(12, 5, bias=False)
    rounded.weight.data.copy_(before)
    quantize(rounded, None, curvature="identity", bits=2, progress=False)
    assert error.square().sum() < (x @ (rounded.weight.detach() - before).T).double().square().sum()


def test_codebooks_are_weighted_by_the_diagonal_of_the_fisher_matrix_itself(net, data):
    """Weights that do not compensate cost what the diagonal says, whatever the blocks."""
    diagonal, block = copy.deepcopy(net), copy.deepcopy(net)
    quantized(diagonal, data, bits=2.5, curvature=DiagonalFisher(damping=1e-4, labels="data"))
    quantized(block, data, bits=2.5, curvature=BlockFisher(damping=1e-4, labels="data"))
    for one, other in zip(diagonal.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    plain = copy.deepcopy(net)
    quantize(plain, None, bits=2.5, curvature="identity", progress=False)
    assert (plain[4].weight - block[4].weight).abs().max() > 1e-2  # the importance counts


def test_scales_of_an_elimination_are_weighted_by_the_diagonal_of_the_fisher_matrix_itself(generator):
    layer = nn.Linear(40, 3, bias=False)
    x = torch.randn(256, 40, generator=generator) @ (torch.randn(40, 40, generator=generator) + 4 * torch.eye(40))
    data, before = [(x, torch.zeros(256, dtype=torch.long))], layer.weight.detach().clone()
    options = {"method": "obq", "grid": "fixed_point", "group": "row", "allocate": False, "progress": False}
    result = quantize(layer, data, bits=4, curvature=Layerwise(damping=1e-6, num_grads=256), **options)
    moments = x.double().square().mean(0)
    importance = moments + 1e-6 * moments.mean()
    expected, _ = fit_scale(before, importance.float().expand(3, -1), 4, False)
    torch.testing.assert_close(result.tensors["weight"].scale, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", ["codebook", "fixed_point", "obq"])
def test_a_group_in_which_no_weight_costs_anything_is_quantized_all_the_same(method, generator):
    """A channel without inputs, and a weight that no gradient reaches, without damping."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4, bias=False), nn.Flatten(), nn.Linear(64, 3))
    before = copy.deepcopy(net)
    x = torch.randn(64, 4, 6, 6, generator=generator)
    x[:, 1] = 0
    data = [(x, torch.randint(3, (64,), generator=generator))]
    curvature = Layerwise() if method == "obq" else BlockFisher(damping=0.0)
    options = {"group": "row", "allocate": False, "progress": False, "num_grads": 64}
    quantize(net, data, bits=4, method=method, curvature=curvature, **options)
    for weight, dense in zip(net[0].weight, before[0].weight, strict=True):
        assert (weight - dense).norm() < 0.3 * dense.norm()


def test_refuses_a_fisher_matrix_that_is_not_finite(net, data):
    optimizer = torch.optim.Adam(net.named_parameters())
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    optimizer.step()
    optimizer.state[net[0].weight]["exp_avg_sq"][0] = torch.inf
    before = snapshot(net)
    with pytest.raises(CurvatureError, match="0.weight: the diagonal of its Fisher matrix is not finite"):
        quantize(net, None, curvature=DiagonalFisher.from_optimizer(optimizer), bits=2, progress=False)
    assert_same(snapshot(net), before)


@pytest.mark.parametrize("curvature", ["block", "layerwise", "kronecker", "fishleg"])
def test_obq_prunes_what_the_mask_prunes_in_the_same_pass(curvature, net, data):
    masks = prune(copy.deepcopy(net), data, sparsity=0.5, num_grads=48, progress=False).masks
    compensated, zeroed = copy.deepcopy(net), copy.deepcopy(net)
    options = {"method": "obq", "curvature": curvature, "bits": 6}
    result = quantized(compensated, data, masks=masks, **options)
    for name, mask in masks.items():
        zeroed.get_parameter(name).data.mul_(mask)
        assert not compensated.get_parameter(name)[~mask].any()
    after = quantized(zeroed, data, masks=masks, **options)
    # What pruned weights cost is in the first alone, and less than without compensation.
    assert result.distortion > after.distortion
    kept = masks["4.weight"]
    moved = [(model[4].weight - net[4].weight)[kept].abs().max().item() for model in (compensated, zeroed)]
    assert moved[0] > 2 * moved[1]  # by more than quantization


def test_obq_in_parts_is_that_of_one_network(net, data):
    """Memory that splits the parameters changes neither codes nor distortion."""
    options = {"method": "obq", "curvature": "block", "bits": 2, "damping": 1e-4}
    whole, split = copy.deepcopy(net), copy.deepcopy(net)
    one, other = quantized(whole, data, **options), quantized(split, data, max_memory=1_500_000, **options)
    for name, weight in weights_of(whole).items():
        torch.testing.assert_close(weight, split.get_parameter(name))
    assert other.distortion == pytest.approx(one.distortion, rel=1e-3)


def test_entropy_budget_of_elimination_is_met_whatever_the_seed(net, data):
    for seed in range(4):
        model = copy.deepcopy(net)
        torch.manual_seed(seed)
        for weight in weights_of(model).values():
            nn.init.normal_(weight)
        assert quantized(model, data, method="obq", curvature="layerwise", coding="entropy", bits=1).mean_bits <= 1


def test_many_groups_are_as_good_as_codebooks_fitted_one_by_one(generator):
    layer = nn.Linear(256, 300, bias=False)
    layer.weight.data.normal_(generator=generator)
    result = quantize(layer, None, curvature="identity", bits=3, group="row", progress=False)
    assert result.distortion < 0.5 * 76800 * 0.0345  # of a normal distribution with the best 8 levels


def test_masks_of_some_parameters(net, data):
    masks = {"4.weight": torch.rand(10, 64, generator=torch.Generator().manual_seed(0)) < 0.5}
    result = quantized(net, data, bits=3, masks=masks, params=["0.weight", "4.weight"])
    assert result.tensors["0.weight"].mask() is None
    assert torch.equal(result.tensors["4.weight"].mask().view(10, 64), masks["4.weight"])
    assert not net[4].weight[~masks["4.weight"]].any()


def test_curvature_that_cannot_be_inverted_is_an_error_that_names_the_parameter(generator):
    from fishleg_ext.curvature import Blocks, CurvatureError
    from fishleg_ext.quantization.elimination import eliminate_to_codes

    rows, kept = torch.randn(2, 4, generator=generator), torch.tensor([[True, False, False, False]] * 2)
    table, broken = torch.tensor([[[-1.0, 1.0]]]), torch.full((1, 4, 4), torch.nan)
    for order in ("cheapest", "given"):
        with pytest.raises(CurvatureError, match="not positive definite"):
            eliminate_to_codes(Blocks(broken), rows, kept, table, order=order, conditioned=False)


@pytest.mark.parametrize("method", ["codebook", "obq"])
def test_equal_bits_of_entropy_are_those_of_each_tensor(method, net, data):
    curvature = "block" if method == "obq" else "diagonal"
    options = {"bits": 1.7, "coding": "entropy", "method": method, "curvature": curvature}
    result = quantized(net, data, allocate=False, **options)
    spent = {name: entropy(tensor.kept_codes()) for name, tensor in result.tensors.items()}
    assert result.mean_bits <= 1.7
    if method == "codebook":
        assert max(spent.values()) <= 1.7
    assert spent["4.weight"] > 1.2
    together = {n: entropy(t.kept_codes()) for n, t in quantized(make_net(), data, **options).tensors.items()}
    assert max(together.values()) > 1.8


def test_groups_without_weights_take_no_room(generator):
    layer = nn.Linear(64, 50, bias=False)
    masks = {"weight": torch.zeros(50, 64, dtype=torch.bool)}
    masks["weight"][:5] = True
    for allocate in (True, False):
        model = copy.deepcopy(layer)
        options = {"curvature": "identity", "group": "row", "bits": 4, "allocate": allocate}
        result = quantize(model, None, masks=masks, progress=False, **options)
        assert not result.bits["weight"][5:].any()
        assert result.sizes()["codebook"] <= 4 * (5 * 128 + 45)


def test_fisher_is_read_off_the_optimizer(net, data):
    optimizer = torch.optim.AdamW(net.named_parameters(), lr=1e-3)
    for x, y in data * 3:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    recipe = DiagonalFisher.from_optimizer(optimizer, batch_size=16)
    for name, weight in weights_of(net).items():
        state = optimizer.state[weight]
        moment = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
        torch.testing.assert_close(recipe.recorded([name])[name] ** 2, 16 * moment)
    same = DiagonalFisher.from_optimizer(optimizer, net)
    torch.testing.assert_close(same.recorded(["0.weight"])["0.weight"] * 4, recipe.recorded(["0.weight"])["0.weight"])
    one, other = copy.deepcopy(net), copy.deepcopy(net)
    result = quantize(one, None, bits=2, curvature=recipe, progress=False)
    assert result.distortion > 0
    quantize(other, None, bits=2, curvature="identity", progress=False)
    assert not torch.equal(one[0].weight, other[0].weight)
    pruned = prune(copy.deepcopy(net), None, sparsity=0.5, curvature=recipe, progress=False)
    name = "0.weight"
    score = (net.get_parameter(name) ** 2 * recipe.squares[name]).detach()
    mask = pruned.masks[name]
    assert score[~mask].max() <= score[mask].min()


def test_optimizers_without_second_moments_are_refused(net, data):
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(ValueError, match="Adam or AdamW after some steps, got Adam that has taken no step"):
        DiagonalFisher.from_optimizer(adam, net)
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    for optimizer in (torch.optim.SGD(net.parameters(), lr=0.1), torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)):
        optimizer.step()
        with pytest.raises(ValueError, match="got SGD that keeps no second moments"):
            DiagonalFisher.from_optimizer(optimizer, net)
    adam.step()
    with pytest.raises(ValueError, match=r"make it of model.named_parameters\(\), or give model="):
        DiagonalFisher.from_optimizer(adam)
    with pytest.raises(TypeError, match=r"a torch.optim.Optimizer, got 3"):
        DiagonalFisher.from_optimizer(3)
    some = torch.optim.Adam([net[0].weight])
    some.step()
    recipe = DiagonalFisher.from_optimizer(some, net)
    with pytest.raises(ValueError, match="no second moment of"):
        quantize(net, None, bits=2, curvature=recipe, progress=False)


def test_tied_weights_other_layouts_and_half_precision(generator, tmp_path):
    class Conv1D(nn.Module):
        """As in transformers: [in, out]."""

        def __init__(self):
            super().__init__()
            self.nf = 6
            self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.zeros(6))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), Conv1D(), nn.Linear(6, 8), nn.Linear(8, 8))
        model[3].weight = model[0].weight
        return model.to(torch.bfloat16)

    model = make()
    x = torch.randn(32, 8, generator=generator).to(torch.bfloat16)
    data = batches(x, torch.randint(0, 8, (32,), generator=generator))
    result = quantize(model, data, bits=3, group="row", num_grads=32, progress=False)
    assert set(result.bits) == {"0.weight", "1.weight", "2.weight"}
    assert len(result.bits["1.weight"]) == 6  # a row for each output
    for column in model[1].weight.T:
        assert len(column.unique()) <= 2 ** int(result.bits["1.weight"].max())
    result.save(tmp_path / "m.safetensors")
    loaded = load_quantized(tmp_path / "m.safetensors", make())
    assert loaded[3].weight is loaded[0].weight
    assert torch.equal(loaded(x), model(x))
    assert loaded[0].weight.dtype == torch.bfloat16


def test_zeros_without_masks_stay_zero(net, data):
    for weight in weights_of(net).values():
        weight.data[torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.5] = 0
    zeros = {name: weight == 0 for name, weight in weights_of(net).items()}
    for options in ({}, {"method": "fixed_point"}, {"group": "row"}, {"coding": "entropy"}):
        model = copy.deepcopy(net)
        quantized(model, data, bits=2, **options)
        for name, zero in zeros.items():
            assert not model.get_parameter(name)[zero].any()


BAD = [
    ({"bits": 0}, ValueError, "expected 0 < bits <= 8, got 0"),
    ({"bits": 9}, ValueError, "expected 0 < bits <= 8, got 9"),
    ({"bits": "4"}, TypeError, "expected bits to be a number, got '4'"),
    ({"bits": float("nan")}, ValueError, "got nan"),
    ({"method": "magic"}, ValueError, "expected method to be 'codebook', 'fixed_point' or 'obq', got 'magic'"),
    ({"group": 0}, ValueError, "'tensor', 'row' or an integer >= 1, got 0"),
    ({"group": "column"}, ValueError, "got 'column'"),
    ({"coding": "zip"}, ValueError, "expected coding to be 'fixed' or 'entropy'"),
    ({"bits": 2.5, "allocate": False}, ValueError, "a whole number of bits with allocate=False, got 2.5"),
    ({"grid": "fixed_point"}, ValueError, "grid is of method='obq' alone"),
    ({"order": "given"}, ValueError, "order is of method='obq' alone"),
    ({"coding": "entropy", "group": "row"}, ValueError, "one codebook for each tensor, got group='row'"),
    ({"method": "obq"}, ValueError, "needs a curvature with blocks"),
    ({"masks": {"nothing": torch.ones(2).bool()}}, ValueError, "nothing"),
    ({"params": "0.wieght"}, ValueError, "0.weight"),
    ({"curvature": "magic"}, ValueError, "magic"),
]


@pytest.mark.parametrize("options, kind, message", BAD, ids=[str(bad[0]) for bad in BAD])
def test_refuses_bad_input_and_leaves_the_model_alone(options, kind, message, net, data):
    before = snapshot(net)
    with pytest.raises(kind, match=message):
        quantized(net, data, **{"bits": 3} | options)
    assert_same(before, snapshot(net))


def test_refuses_weights_that_are_not_finite_and_no_data(net, data):
    with pytest.raises(ValueError, match="needs data"):
        quantize(net, None, bits=3, progress=False)
    net[0].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"0.weight contains NaN or inf"):
        quantized(net, data, bits=3)


def test_a_failure_on_the_way_leaves_the_model_alone(net, data, monkeypatch):
    before = snapshot(net)
    calls, real = [], QuantizedTensor.unpack

    def fails_at_last(self):
        calls.append(self)
        if len(calls) == 3:
            raise MemoryError("none left")
        return real(self)

    monkeypatch.setattr(QuantizedTensor, "unpack", fails_at_last)
    with pytest.raises(MemoryError):
        quantized(net, data, bits=3)
    assert_same(before, snapshot(net))


def test_the_table_and_repr_say_what_was_done(net, data):
    result = quantized(net, data, bits=3)
    assert "0.weight" in result.table()
    assert "3 parameters" in repr(result)
    assert json.loads(json.dumps(result.settings))["bits"] == 3
