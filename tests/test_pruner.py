"""Pruner, step by step on small networks."""

import gc
import sys
import weakref

import pytest
import torch
from oracles import usable
from small import make_net, prunable, prune
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import BlockFisher


def test_a_state_with_an_allocation_is_for_a_pruner_that_has_one(data):
    options = {"curvature": "layerwise", "num_grads": 16, "progress": False}
    pruner = fishleg_ext.Pruner(make_net(), allocation="block", **options)
    with pytest.raises(ValueError, match="with the same allocation"):
        fishleg_ext.Pruner(make_net(), **options).load_state_dict(pruner.state_dict())


def test_rounds_fall_geometrically_and_masks_only_grow(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, damping=1e-3, progress=False)
    masks = pruner.masks
    for done in range(1, 4):
        pruner.estimate(data, F.cross_entropy)
        result = pruner.prune_to(1 - 0.1 ** (done / 3))
        for name, mask in result.masks.items():
            assert not (mask & ~masks[name]).any()
        masks = result.masks
    again = make_net()
    whole = prune(again, data, sparsity=0.9, num_grads=16, recomputations=3)
    assert [h["sparsity"] for h in whole.history] == [h["sparsity"] for h in result.history]
    assert all(torch.equal(m, masks[n]) for n, m in whole.masks.items())
    assert whole.predicted_loss_increase == pytest.approx(sum(h["predicted_loss_increase"] for h in whole.history))


def test_going_on_under_one_estimate_equals_one_step(data):
    """Greedy elimination to 50 % and on to 80 % is greedy elimination to 80 %."""
    once, twice = make_net().double(), make_net().double()
    data = [(x.double(), y) for x, y in data]
    options = {"num_grads": 32, "block_size": 16, "damping": 1e-3, "progress": False}
    whole = fishleg_ext.prune(once, data, sparsity=0.8, scope="layer", **options)
    pruner = fishleg_ext.Pruner(twice, scope="layer", **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    result = pruner.prune_to(0.8)
    for name, mask in whole.masks.items():
        assert torch.equal(mask, result.masks[name])
        torch.testing.assert_close(once.state_dict()[name], twice.state_dict()[name])
    assert result.predicted_loss_increase == pytest.approx(whole.predicted_loss_increase, rel=1e-6)


def test_apply_masks_after_training(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for x, y in data:
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        pruner.apply_masks()
    result = pruner.finalize()
    for name, weight in prunable(net).items():
        assert not weight[~result.masks[name]].any()
        assert weight[result.masks[name]].any()


def test_state_survives(net, data, tmp_path):
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    torch.save(pruner.state_dict(), tmp_path / "pruner.pt")
    again = fishleg_ext.Pruner(make_net(), num_grads=16, block_size=16, progress=False)
    again.load_state_dict(torch.load(tmp_path / "pruner.pt", weights_only=True))
    assert all(torch.equal(m, again.masks[n]) for n, m in pruner.masks.items())
    assert again.history == pruner.history
    torch.testing.assert_close(again.curvature.diag(), pruner.curvature.diag())
    with pytest.raises(
        ValueError,
        match="state of a Pruner with 'pattern'",
    ):
        again.load_state_dict({})
    other = fishleg_ext.Pruner(make_net(), curvature="layerwise", progress=False)
    with pytest.raises(ValueError, match="expected the state of Layerwise, got that of BlockFisher"):
        other.load_state_dict(pruner.state_dict())


@pytest.mark.parametrize("options", [{}, {"curvature": "layerwise", "allocation": "block"}, {"max_memory": 131_000}])
def test_a_pruner_that_is_let_go_is_gone(data, options):
    """With all its curvature, at once: no cycle keeps it until the garbage is collected."""
    torch.func.vmap(torch.func.grad(torch.sin))(torch.ones(1))  # the first keeps the frames that it was called from
    net = make_net()
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, progress=False, **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    left = [weakref.ref(each) for each in (pruner, pruner.curvature, net)]
    gc.disable()
    try:
        del pruner, net
        assert [each() for each in left] == [None] * 3
    finally:
        gc.enable()


def test_order_of_calls_is_explained(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    with pytest.raises(RuntimeError, match="call estimate"):
        pruner.prune_to(0.5)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    with pytest.raises(ValueError, match=r"sparsity 0.4 is \d+ weights, but \d+ are pruned already"):
        pruner.prune_to(0.4)
    with pytest.raises(ValueError, match=r"expected a sparsity in \[0, 1\), got None"):
        pruner.prune_to()


def test_progress_is_drawn_on_a_terminal_only(net, data, capfd, monkeypatch):
    prune(net, data, sparsity=0.5, progress=True)
    assert capfd.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    prune(make_net(), data, sparsity=0.5, progress=True)
    drawn = capfd.readouterr().err
    assert all(stage in drawn for stage in ("gradients", "elimination", "compensation"))
    prune(make_net(), data, sparsity=0.5, progress=False)
    assert capfd.readouterr().err == ""


def test_impl_governs_every_stage(net, data):
    with pytest.raises(NotImplementedError, match="block_gram_: impl='cuda'"):
        fishleg_ext.Pruner(net, impl="cuda", num_grads=8, progress=False).estimate(data, F.cross_entropy)
    pruner = fishleg_ext.Pruner(net, impl="triton", curvature="identity", progress=False)
    pruner.estimate(None, F.cross_entropy)
    with pytest.raises(NotImplementedError, match="obs_score: impl='triton'"):
        pruner.prune_to(0.5)
    with pytest.raises(NotImplementedError, match="impl='triton'"):
        pruner.apply_masks()


def test_use_impl_reaches_the_ops_of_prune(net, data):
    with fishleg_ext.use_impl("cuda"):
        with pytest.raises(NotImplementedError, match="impl='cuda'"):
            prune(net, data, sparsity=0.5)
        prune(net, data, sparsity=0.5, impl="reference")


def test_masks_handed_out_are_copies(net):
    pruner = fishleg_ext.Pruner(net, progress=False)
    pruner.masks["4.weight"].fill_(False)
    assert pruner.masks["4.weight"].all()


@pytest.mark.parametrize("models", [{}, {"curvature": "layerwise"}, {"curvature": "layerwise", "allocation": "block"}])
def test_pruning_goes_on_from_a_saved_estimate(models, data, tmp_path):
    once, twice = make_net(), make_net()
    options = models | usable(**models, num_grads=16, block_size=16, progress=False)
    pruner = fishleg_ext.Pruner(once, **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    torch.save({"pruner": pruner.state_dict(), "model": once.state_dict()}, tmp_path / "state.pt")
    expected = pruner.prune_to(0.8)
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    assert len(saved["pruner"]["history"]) == 1
    twice.load_state_dict(saved["model"])
    again = fishleg_ext.Pruner(twice, **options)
    again.load_state_dict(saved["pruner"])
    got = again.prune_to(0.8)
    assert got.history[-1]["num_grads"] == 16
    assert all(torch.equal(mask, got.masks[name]) for name, mask in expected.masks.items())
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())


@pytest.mark.parametrize(
    "other", [{"curvature": BlockFisher(32)}, {"curvature": "diagonal"}, {"curvature": "low_rank"}]
)
def test_a_state_of_other_arguments_changes_nothing(data, other):
    options = {"num_grads": 16, "block_size": 16, "progress": False}
    pruner = fishleg_ext.Pruner(make_net(), **options)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.5)
    net = make_net()
    again = fishleg_ext.Pruner(net, **other, **usable(**other, num_grads=16, block_size=16, progress=False))
    again.estimate(data, F.cross_entropy)
    with pytest.raises(ValueError, match="expected"):
        again.load_state_dict(pruner.state_dict())
    assert all(mask.all() for mask in again.masks.values())
    assert again.prune_to(0.5).sparsity == 0.5
