"""Retraining: codes that follow the optimizer, and keep to their number, their zeros and their entropy."""

import pytest
import torch
from small import assert_same, make_net, snapshot
from torch import nn
from torch.nn import functional as F

from fishleg_ext import load_quantized, prune, quantize


def quantized(net, data, **options):
    return quantize(net, data, progress=False, num_grads=48, **options)


def weights_of(net):
    return {name: p for name, p in net.named_parameters() if p.dim() > 1}


def test_codebooks_shorter_than_their_room_gain_no_code_in_retraining():
    layer = nn.Linear(6, 2, bias=False)
    layer.weight.data = torch.tensor([[-1.0, -2.0, -3.0] * 2, [-1.0, -2.0, -3.0] * 2])
    result = quantize(layer, None, curvature="identity", bits=2, group="row", allocate=False, progress=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    result.attach(optimizer)
    layer.weight.grad = torch.full_like(layer.weight, -0.95)  # to -0.05 and less, nearer to 0 than to any code
    optimizer.step()
    assert layer.weight.max() < -0.04
    assert not (layer.weight == 0).any()


@pytest.mark.parametrize("method", ["codebook", "fixed_point", "entropy"])
@pytest.mark.parametrize("masked", [False, True])
def test_retraining_keeps_codes_and_zeros_and_lowers_the_loss(method, masked, net, data, tmp_path):
    options = {"coding": "entropy"} if method == "entropy" else {"method": method}
    masks = prune(net, data, sparsity=0.5, num_grads=48, progress=False).masks if masked else None
    result = quantized(net, data, bits=2, masks=masks, **options)
    loss = lambda: sum(F.cross_entropy(net(x), y).item() for x, y in data)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    before = loss()
    handle = result.attach(optimizer)
    for _ in range(20):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
            for name, weight in weights_of(net).items():
                widths = result.bits[name].long()
                assert len(weight[weight != 0].unique()) <= 1 << int(widths.max())
                assert masks is None or not weight[~masks[name]].any()
    handle.remove()
    assert loss() < before
    path = tmp_path / "net.safetensors"
    result.save(path)
    loaded = load_quantized(path, make_net()).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in net.state_dict().items())
    optimizer.step()
    assert all(len(w.unique()) > 10 for w in weights_of(net).values())  # no longer held


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_retraining_never_has_more_entropy_than_before(masked, refit, net, data, tmp_path):
    masks = prune(net, data, sparsity=0.5, num_grads=48, progress=False).masks if masked else None
    result = quantized(net, data, bits=1.8, masks=masks, coding="entropy")
    most = result.mean_bits
    optimizer = torch.optim.SGD(net.parameters(), lr=0.2)
    handle = result.attach(optimizer, refit=refit)
    losses, seen = [], []
    for _ in range(20):
        losses.append(0.0)
        for x, y in data:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(x), y)
            loss.backward()
            optimizer.step()
            losses[-1] += loss.item()
            seen.append(result.mean_bits)
    assert max(seen) <= most * (1 + 1e-6)
    assert sum(seen[-10:]) / 10 > most - 0.2  # and little less
    assert losses[-1] < 0.7 * losses[0]
    before = snapshot(net)
    handle.remove()
    assert_same(before, snapshot(net))
    path = tmp_path / "net.safetensors"
    result.save(path)
    assert path.stat().st_size == result.size
    loaded = load_quantized(path, make_net()).state_dict()
    assert all(torch.equal(x, loaded[name]) for name, x in net.state_dict().items())
    again = result.attach(optimizer, refit=refit)
    optimizer.step()
    again.remove()
    again.remove()
    assert result.mean_bits <= seen[-1] * (1 + 1e-6)


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(("few", "many"), [(1, 3), (9000, 11000)])
def test_codes_that_become_as_frequent_keep_to_their_entropy(few, many, refit):
    layer = nn.Linear(few + many, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.cat([torch.ones(few), -torch.ones(many)]))
    masks = {"weight": torch.ones(1, few + many, dtype=torch.bool)}
    options = {"coding": "entropy", "curvature": "identity", "masks": masks, "progress": False}
    result = quantize(layer, None, bits=1, **options)
    most = result.mean_bits
    handle = result.attach(optimizer := torch.optim.SGD(layer.parameters(), lr=1.0), refit=refit)
    half = (few + many) // 2
    layer.weight.grad = torch.zeros_like(layer.weight)
    layer.weight.grad[:, few:half] = -2.0  # as many are now near the one as near the other
    optimizer.step()
    handle.remove()
    assert 0 <= result.mean_bits <= most * (1 + 1e-6)
    if not refit:  # the code that was more frequent takes all
        assert (layer.weight == -1).all()


def test_codes_come_back_when_there_is_room_for_them(generator):
    layer = nn.Linear(500, 4, bias=False)
    layer.weight.data.normal_(generator=generator)
    options = {"coding": "entropy", "curvature": "identity", "progress": False}
    result = quantize(layer, None, bits=2.5, **options)
    values, most = len(layer.weight.unique()), result.mean_bits
    start = layer.weight.detach().clone()
    result.attach(optimizer := torch.optim.SGD(layer.parameters(), lr=1.0), refit=False)

    def move_to(target):
        layer.weight.grad = real - target
        optimizer.step()
        return target

    real = start
    real = move_to(torch.zeros_like(start))
    assert result.mean_bits < 0.1
    for _ in range(100):
        real = move_to(start)
    assert len(layer.weight.unique()) == values
    assert result.mean_bits == pytest.approx(most, abs=0.01)


def test_weights_that_diverge_are_seen(net, data):
    for options in ({}, {"coding": "entropy"}, {"method": "fixed_point"}):
        result = quantized(net, data, bits=2, **options)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        handle = result.attach(optimizer, refit=False)
        net[4].weight.grad = torch.full_like(net[4].weight, 0.0)
        net[4].weight.grad[0, 0] = torch.nan
        start = net[4].weight.detach().clone()
        optimizer.step()
        assert net[4].weight[0, 0].isnan()
        assert net[4].weight.isnan().sum() == 1
        handle.remove()
        net[4].weight.data.copy_(start)


def test_weights_that_changed_are_not_saved_silently(net, data, tmp_path):
    result = quantized(net, data, bits=2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    handle = result.attach(optimizer)
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    optimizer.step()
    result.save(tmp_path / "net.safetensors")
    handle.remove()
    result.save(tmp_path / "net.safetensors")
    optimizer.step()
    with pytest.raises(ValueError, match="changed since it was quantized"):
        result.save(tmp_path / "net.safetensors")
    with pytest.raises(ValueError, match="changed since it was quantized"):
        result.attach(optimizer)
    optimizer.step()  # the hook is not left behind
    assert len(net[4].weight.unique()) > 10


def test_each_optimizer_has_its_own_parameters(net, data):
    result = quantized(net, data, bits=2)
    first, second = (torch.optim.SGD([w], lr=0.1) for w in (net[0].weight, net[4].weight))
    one, _ = result.attach(first), result.attach(second)
    with pytest.raises(ValueError, match="that no optimizer is attached to, got 0.weight"):
        result.attach(torch.optim.SGD(net.parameters(), lr=0.1))
    one.remove()
    F.cross_entropy(net(data[0][0]), data[0][1]).backward()
    first.step()
    second.step()
    assert len(net[0].weight.unique()) > 4
    assert len(net[4].weight.unique()) <= 4


def test_attach_refuses_other_optimizers(net, data):
    result = quantized(net, data, bits=2)
    with pytest.raises(ValueError, match="of none of them"):
        result.attach(torch.optim.SGD(make_net().parameters(), lr=0.1))
