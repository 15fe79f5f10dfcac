"""Bad input is explained, and changes nothing; what fails half way is undone."""

import copy

import pytest
import torch
from oracles import with_estimate
from small import assert_same, prune, snapshot
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import BlockFisher, CurvatureError, Layerwise
from fishleg_ext.curvature.block import BlockEstimate


def failing():
    """A recipe whose estimates break in the middle of the second round."""
    calls = []

    class FailingEstimate(BlockEstimate):
        def blocks(self, name):
            if name == "6.weight":
                calls.append(name)
                if len(calls) == 4:
                    raise KeyboardInterrupt
            return super().blocks(name)

    return with_estimate(BlockFisher, FailingEstimate)(16, 1e-3)


def test_an_exception_leaves_the_model_as_it_was(net, data):
    before = snapshot(net)
    with pytest.raises(KeyboardInterrupt):
        prune(
            net,
            data,
            sparsity=0.8,
            curvature=failing(),
            recomputations=3,
            recalibrate_batchnorm=True,
        )
    assert_same(before, snapshot(net))


def test_a_failed_prune_to_leaves_weights_and_masks(net, data):
    pruner = fishleg_ext.Pruner(net, curvature=failing(), num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    pruner.prune_to(0.3)
    before, masks = snapshot(net), pruner.masks
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_to(0.6)
    assert_same(before, snapshot(net))
    assert all(torch.equal(m, masks[n]) for n, m in pruner.masks.items())
    assert len(pruner.history) == 1


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({}, ValueError, "expected a sparsity"),
        ({"sparsity": 1.0}, ValueError, r"sparsity in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1}, ValueError, "got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "got nan"),
        ({"sparsity": "0.5"}, TypeError, "got '0.5'"),
        ({"sparsity": 0.5, "curvature": "full"}, ValueError, "got 'full'"),
        ({"sparsity": 0.5, "saliency": "greedy"}, ValueError, "got 'greedy'"),
        ({"sparsity": 0.5, "scope": "rows"}, ValueError, "got 'rows'"),
        (
            {"sparsity": 0.5, "scope": "global", "allocation": "block"},
            ValueError,
            "allocation cannot be .* scope='global'",
        ),
        ({"sparsity": 0.5, "allocation": "blocks"}, ValueError, "got 'blocks'"),
        (
            {"sparsity": 0.5, "allocation": Layerwise(inputs="sequential")},
            ValueError,
            "of sequential inputs",
        ),
        (
            {"sparsity": 0.5, "curvature": "layerwise", "saliency": "simultaneous", "recomputations": 2},
            ValueError,
            "single-weight scores of Layerwise would count on these",
        ),
        (
            {"sparsity": 0.5, "saliency": "fixed_order"},
            ValueError,
            "fixed_order' cannot .* scope='layer'",
        ),
        ({"sparsity": 0.5, "curvature": "layerwise", "damping": 0.0}, ValueError, "damping"),
        ({"sparsity": 0.5, "scope": {"0.weight": 0.5}}, ValueError, "sparsity= cannot be combined with scope="),
        ({"scope": {"0.wait": 0.5}}, ValueError, "0.wait not among"),
        ({"scope": {"0.weight": 1.5}}, ValueError, "sparsity of 0.weight"),
        ({"sparsity": 0.5, "pattern": "4:2"}, ValueError, "got '4:2'"),
        ({"sparsity": 0.5, "params": "nope"}, ValueError, "no parameter matches 'nope'"),
        ({"sparsity": 0.5, "num_grads": 0}, ValueError, "num_grads"),
        ({"sparsity": 0.5, "grad_batch_size": 1.5}, TypeError, "grad_batch_size"),
        ({"sparsity": 0.5, "max_memory": 2e8}, TypeError, "max_memory to be an integer"),
        ({"sparsity": 0.5, "block_size": 2.5}, TypeError, "block_size to be an integer"),
        ({"sparsity": 0.5, "curvature": "identity", "damping": -1.0}, ValueError, "damping"),
        ({"sparsity": 0.5, "likelihood": "poisson"}, ValueError, "got 'poisson'"),
        ({"scope": {0: 0.5}}, ValueError, "0 not among"),
        ({"sparsity": 0.5, "pattern": None}, ValueError, "got None"),
        ({"sparsity": 0.5, "pattern": "0:0"}, ValueError, "got '0:0'"),
        ({"sparsity": 0.5, "recomputations": 0}, ValueError, "recomputations"),
        ({"sparsity": 0.5, "block_size": 0}, ValueError, "block_size"),
        ({"sparsity": 0.5, "damping": -1.0}, ValueError, "damping"),
        ({"sparsity": 0.5, "labels": "true"}, ValueError, "got 'true'"),
        ({"sparsity": 0.5, "impl": "fast"}, ValueError, "got 'fast'"),
        ({"sparsity": 0.5, "impl": "cuda"}, NotImplementedError, "impl='cuda'"),
    ],
)
def test_bad_arguments_are_explained_and_change_nothing(net, data, options, error, message):
    before = snapshot(net)
    with pytest.raises(error, match=message):
        prune(net, data, **options)
    assert_same(before, snapshot(net))


def test_bad_data_is_explained_and_changes_nothing(net, data):
    before = snapshot(net)
    with pytest.raises(ValueError, match="at least one sample"):
        prune(net, [], sparsity=0.5)
    with pytest.raises(ValueError, match="needs data, .*got None"):
        prune(net, None, sparsity=0.5)
    with pytest.raises(TypeError, match="data to be an iterable of batches, got 5"):
        prune(net, 5, sparsity=0.5)
    with pytest.raises(TypeError, match="loss_fn to be a function of outputs and targets or None, got 0.5"):
        prune(net, data, 0.5, sparsity=0.5)
    with pytest.raises(TypeError, match="model to be an nn.Module, got 'net'"):
        prune("net", data, sparsity=0.5)
    with pytest.raises(ValueError, match=r"recomputations=2, got a one-shot list_iterator"):
        prune(net, iter(data), sparsity=0.5, recomputations=2)
    with pytest.raises(ValueError, match="max_memory splits"):
        prune(net, iter(data), sparsity=0.5, max_memory=131_000)
    poisoned = [(x * torch.inf, y) for x, y in data]
    with pytest.raises(ValueError, match=r"gradients of 0.weight.* contain NaN or inf"):
        prune(net, poisoned, sparsity=0.5)
    with pytest.raises(ValueError, match="likelihood="):
        prune(net, data, loss_fn=F.mse_loss, sparsity=0.5, labels="model")
    assert_same(before, snapshot(net))
    prune(net, iter(data), sparsity=0.5)


def test_bad_weights_are_named(net, data):
    with torch.no_grad():
        net[6].weight[0, 0] = torch.inf
    before = snapshot(net)
    with pytest.raises(ValueError, match="6.weight contains NaN or inf"):
        prune(net, data, sparsity=0.5)
    assert_same(before, snapshot(net))


class SingularEstimate(BlockEstimate):
    """A Gram matrix that no damping mends."""

    def update(self, observation):
        super().update(observation)
        self._gram["4.weight"][0].fill_(torch.nan)


def test_a_block_that_cannot_be_inverted_is_named(net, data):
    before = snapshot(net)
    with pytest.raises(CurvatureError, match=r"4.weight: 1 of 40 Fisher blocks cannot be inverted"):
        prune(net, data, sparsity=0.5, curvature=with_estimate(BlockFisher, SingularEstimate)(16, 1e-3))
    assert_same(before, snapshot(net))


def test_an_estimate_that_failed_is_not_used(net, data):
    def fails(outputs, targets):
        raise ZeroDivisionError

    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    with pytest.raises(ZeroDivisionError):
        pruner.estimate(iter(data), fails)
    with pytest.raises(RuntimeError, match="call estimate"):
        pruner.prune_to(0.5)


def test_replaced_parameters_are_noticed(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="0.weight was replaced"):
        pruner.estimate(data, F.cross_entropy)


def test_weights_that_went_bad_after_the_estimate_are_named(net, data):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    with torch.no_grad():
        net[4].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="4.weight contains NaN"):
        pruner.prune_to(0.5)


def test_an_interrupt_while_weights_are_written_restores_them(net, data, monkeypatch):
    pruner = fishleg_ext.Pruner(net, num_grads=16, progress=False)
    pruner.estimate(data, F.cross_entropy)
    before = snapshot(net)

    def interrupt(masks):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruner._masks, "set", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pruner.prune_to(0.5)
    assert_same(before, snapshot(net))
