"""What is observed is what was asked for, in as much memory as it may take."""

import re
import warnings
import weakref

import pytest
import torch
from oracles import usable, with_estimate
from small import make_net, prunable, prune
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import BlockFisher, Estimate
from fishleg_ext.curvature.block import BlockEstimate
from fishleg_ext.estimator import Stopwatch
from fishleg_ext.observation.observe import observe


def test_allocation_in_parts_is_the_same_and_serves_one_prune_to(data):
    options = {"curvature": "layerwise", "allocation": "block", "num_grads": 16, "block_size": 16, "progress": False}
    free, tight = make_net(), make_net()
    expected = fishleg_ext.prune(free, data, sparsity=0.6, **options)
    pruner = fishleg_ext.Pruner(tight, max_memory=2 * 131_000, **options)
    assert len(pruner.allocator.groups) > 1
    pruner.estimate(data, F.cross_entropy)
    got = pruner.prune_to(0.6)
    assert all(torch.equal(mask, got.masks[name]) for name, mask in expected.masks.items())
    with pytest.raises(RuntimeError, match="before each prune_to"):
        pruner.prune_to(0.7)


@pytest.mark.parametrize("curvature", ["diagonal", "block"])
@pytest.mark.parametrize("saliency", ["exact", "simultaneous"])
def test_max_memory_changes_passes_not_results(data, curvature, saliency):
    dataset = torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    options = {
        "sparsity": 0.7,
        "curvature": curvature,
        "saliency": saliency,
        "recomputations": 2,
        "labels": "model",
    }
    free, tight = make_net(), make_net()
    budget = {"diagonal": 15_400, "block": 131_000}[curvature]  # just enough for the largest layer
    expected = prune(free, loader, **options)
    got = prune(tight, loader, max_memory=budget, **options)
    pruner = fishleg_ext.Pruner(make_net(), curvature=curvature, max_memory=budget, **usable(curvature, block_size=16))
    assert len(pruner.estimator.groups) > 1
    for name, mask in expected.masks.items():
        assert torch.equal(mask, got.masks[name])
        torch.testing.assert_close(tight.state_dict()[name], free.state_dict()[name])
    assert got.predicted_loss_increase == pytest.approx(expected.predicted_loss_increase)


def test_max_memory_that_holds_not_even_one_layer_is_refused(net, data):
    with pytest.raises(
        ValueError, match=r"max_memory=1000 is too small for BlockFisher: 4.weight needs at least \d+ bytes"
    ):
        prune(net, data, sparsity=0.5, max_memory=1000)
    with pytest.raises(ValueError, match="LowRankFisher: all parameters together need"):
        prune(net, data, sparsity=0.5, curvature="low_rank", max_memory=50_000)


def test_max_memory_beside_an_allocation_is_what_both_need(net, data):
    """Whoever gives what each error asks for gets there, and not before the error says so."""
    options = {"curvature": "layerwise", "allocation": "block", "num_grads": 16, "progress": False}
    needed = [1000]
    while len(needed) < 4:  # one error for each of the two at most
        try:
            result = prune(net, data, sparsity=0.5, max_memory=needed[-1], **options)
            break
        except ValueError as error:
            asked = re.search(r"needs at least (\d+) bytes, half of them for allocation=", str(error))
            needed.append(int(asked[1]))
    assert 1 < len(needed) < 4
    assert needed == sorted(set(needed))
    assert result.sparsity == pytest.approx(0.5, abs=1e-3)


def test_raised_damping_is_in_the_history(net, data):
    with pytest.warns(UserWarning, match="not positive definite with damping 1e-12"):
        result = prune(net, data, sparsity=0.5, damping=1e-12, num_grads=4)
    assert result.history[0]["damping_raised"]["4.weight"] > 0
    assert result.history[0]["num_grads"] == 4


def test_short_data_warns_and_is_used(net, data):
    with pytest.warns(UserWarning, match="after 48 of num_grads=1024"):
        result = prune(net, data, sparsity=0.5, num_grads=None)
    assert result.history[0]["num_grads"] == 48


class Spy(BlockEstimate):
    """Keeps its gradients."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def update(self, observation):
        super().update(observation)
        self.seen.append({name: grads.clone() for name, grads in observation.gradients.items()})

    def gradients(self, name):
        return torch.cat([chunk[name] for chunk in self.seen])


SPYING = with_estimate(BlockFisher, Spy)(16, 1e-3)


def test_gradients_of_the_pruned_are_masked_in_later_rounds(net, data):
    pruner = fishleg_ext.Pruner(net, curvature=SPYING, num_grads=16, progress=False)
    for sparsity in (0.5, 0.8):
        masks = pruner.masks
        pruner.estimate(data, F.cross_entropy)
        for name, mask in masks.items():
            assert not pruner.curvature.gradients(name)[:, ~mask].any()
            assert pruner.curvature.gradients(name)[:, mask].any()
        pruner.prune_to(sparsity)


@pytest.mark.parametrize(
    "options",
    [
        {"labels": "model"},
        {"labels": "model", "likelihood": lambda outputs, generator: outputs.argmax(1)},
        {"grad_batch_size": 3},
        {"seed": 5, "labels": "model"},
    ],
)
def test_what_is_observed_is_what_was_asked_for(net, data, options):
    pruner = fishleg_ext.Pruner(net, curvature=SPYING, num_grads=12, progress=False, **options)
    pruner.estimate(data, F.cross_entropy)
    spy, weights = pruner.curvature, prunable(net)
    recorder = SPYING.start(weights)
    observe(net, data, F.cross_entropy, recorder, weights, num_grads=12, **options)
    plain = SPYING.start(weights)
    observe(net, data, F.cross_entropy, plain, weights, num_grads=12)
    for name in weights:
        assert torch.equal(spy.gradients(name), recorder.gradients(name))
    assert not torch.equal(plain.gradients("4.weight"), spy.gradients("4.weight"))


def test_max_memory_bounds_the_chunks(net, data):
    pruner = fishleg_ext.Pruner(net, curvature=SPYING, num_grads=16, max_memory=150_000, progress=False)
    pruner.estimate(data, F.cross_entropy)
    largest = 4 * max(weight.numel() for weight in prunable(net).values())
    assert max(len(chunk["4.weight"]) for chunk in pruner.curvature.seen) == (150_000 - 128_000) // largest


def loader_of(data, **options):
    dataset = torch.utils.data.TensorDataset(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))
    return torch.utils.data.DataLoader(dataset, batch_size=8, **options)


@pytest.mark.parametrize(
    "options", [{}, {"recomputations": 2}, {"recalibrate_batchnorm": True}, {"max_memory": 131_000}]
)
def test_a_data_loader_leaves_the_rng_alone(net, data, options):
    state = torch.get_rng_state()
    prune(net, loader_of(data, shuffle=True), sparsity=0.5, **options)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_split_estimate_serves_one_prune_to(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, block_size=16, max_memory=131_000, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.4)
    with pytest.raises(RuntimeError, match="before each prune_to"):
        pruner.prune_to(0.6)
    pruner.estimate(data, F.cross_entropy)
    assert pruner.prune_to(0.6).sparsity == pytest.approx(0.6, abs=1e-3)


def test_sampled_gaussian_labels_do_not_depend_on_max_memory(generator):
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(6, 30), nn.Tanh(), nn.Linear(30, 20)) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    data = [(torch.randn(64, 6, generator=generator), torch.randn(64, 20, generator=generator))]
    options = {"sparsity": 0.5, "curvature": "diagonal", "labels": "model", "likelihood": "gaussian", "num_grads": 64}
    free = prune(nets[0], data, F.mse_loss, max_memory=10**6, **options)
    tight = prune(nets[1], data, F.mse_loss, max_memory=6 * 2400 + 10 * 2400 * 3, **options)
    assert all(torch.equal(mask, tight.masks[name]) for name, mask in free.masks.items())


def test_raised_damping_of_every_part_is_reported(data):
    options = {"damping": 1e-12, "num_grads": 4, "sparsity": 0.5}
    with pytest.warns(UserWarning, match="not positive definite"):
        whole = prune(make_net(), data, **options)
    with pytest.warns(UserWarning, match="not positive definite"):
        split = prune(make_net(), data, max_memory=131_000, **options)
    assert whole.history[0]["damping_raised"] == split.history[0]["damping_raised"]
    assert len(whole.history[0]["damping_raised"]) > 1


def test_the_identity_needs_no_memory(net):
    prune(net, None, sparsity=0.5, curvature="identity", max_memory=1)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"saliency": "simultaneous"},
        {"saliency": "fixed_order", "scope": "layer"},
        {"first_order": 0.5},
        {"curvature": "diagonal", "allocation": "block"},
    ],
)
def test_one_estimate_lives_at_a_time_where_memory_splits_them(net, data, options, monkeypatch):
    """The last group's is let go before the next one is begun; beside that of the allocation, if there is one."""
    alive, most = weakref.WeakSet(), []
    begin = Estimate.__init__

    def counted(self, recipe, weights, *args, **more):
        if weights:
            most.append(len(alive))
            alive.add(self)
        begin(self, recipe, weights, *args, **more)

    monkeypatch.setattr(Estimate, "__init__", counted)
    memory = 131_000 * (2 if "allocation" in options else 1)
    settings = options | usable(**options, block_size=16)
    pruner = fishleg_ext.Pruner(net, num_grads=16, max_memory=memory, progress=False, **settings)
    assert any(len(e.groups) > 1 for e in (pruner.estimator, pruner.allocator) if e is not None)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.4)
    assert len(most) >= 3
    assert max(most) == (1 if "allocation" in options else 0)


@pytest.mark.parametrize("fits", [True, False])
@pytest.mark.parametrize("curvature, way", [("low_rank", "num_grads="), ("block", "max_memory=")])
def test_an_estimate_that_will_not_fit_is_told_before_the_data_is_read(curvature, way, fits, monkeypatch):
    """64 gradients of 8,192 weights are 2 MiB, Gram matrices of 128 are 4 MiB."""
    monkeypatch.setattr("fishleg_ext.estimator.free_bytes", lambda device: 2**24 if fits else 2**20)
    told_before = []

    def batches():
        told_before.append(len(told))
        yield torch.randn(64, 2048), torch.randint(4, (64,))

    pruner = fishleg_ext.Pruner(nn.Linear(2048, 4), curvature=curvature, num_grads=64, progress=False)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner.estimate(batches(), F.cross_entropy)
    assert told_before == [0 if fits else 1]
    if not fits:
        message = str(told[0].message)
        assert "of 8,192 weights from 64 gradients takes 0.0 GiB on cpu, of which 0.0 GiB are free" in message
        assert way in message


def test_a_stage_lasts_until_the_gpu_has_done_it(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: waited.append(dict(timed.seconds)))
    timed = Stopwatch(torch.device("cuda:1"))
    with timed("one"):
        pass
    with timed("two"):
        pass
    assert [list(seconds) for seconds in waited] == [[], ["one"]]  # before each time was taken
