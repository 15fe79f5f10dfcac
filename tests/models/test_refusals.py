"""What cannot be observed is refused by name, and samples that are not apart are observed one by one."""

import copy

import pytest
import torch
from oracles import batches
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from models.functions import (
    OF_GRADIENTS,
    OF_INPUTS,
    Net,
    SharedRows,
    assert_alike,
    prune,
)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight * 0.1, self.bias)


class OwnFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.t() @ x


class Unseen(nn.Linear):
    def forward(self, x):
        return OwnFunction.apply(x, self.weight) + self.bias


class ScaledBias(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight) + 2 * self.bias


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
@pytest.mark.parametrize("layer, reason", [(Scaled, "it enters mul first"), (Unseen, "it enters unseen")])
def test_a_weight_that_is_not_only_multiplied_by_inputs_is_refused_by_name(layer, reason, data):
    net = nn.Sequential(layer(8, 8), nn.Tanh(), nn.Linear(8, 3))
    before = copy.deepcopy(net.state_dict())
    for curvature in OF_INPUTS:
        with pytest.raises(NotImplementedError, match=f"inputs of 0.weight cannot be observed.*{reason}.*'fishleg'"):
            prune(net, data, curvature=curvature)
        prune(copy.deepcopy(net), data, curvature=curvature, params="2.weight")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    for curvature in OF_GRADIENTS:
        prune(copy.deepcopy(net), data, curvature=curvature)


def test_a_bias_that_is_not_added_as_it_is_is_refused(data):
    net = nn.Sequential(ScaledBias(8, 8), nn.Tanh(), nn.Linear(8, 3))
    with pytest.raises(NotImplementedError, match=r"the bias 0.bias is not added to each product of 0.weight"):
        prune(net, data, curvature="kronecker")
    prune(net, data, curvature="layerwise")


class Standardised(Net):
    """Samples that influence each other."""

    def forward(self, x):
        return super().forward(x - x.mean(0) / 2)


@pytest.mark.parametrize("curvature", OF_INPUTS)
@pytest.mark.parametrize("model, why", [(SharedRows, "project.weight"), (Standardised, "samples influence each other")])
def test_samples_that_are_not_apart_are_observed_one_by_one(model, why, curvature, data):
    x, y = data
    options = {} if curvature.startswith("layerwise") else {"labels": "data"}
    with pytest.warns(UserWarning, match=f"samples are observed one by one, which is slower: .*{why}"):
        together = prune(model(), data, curvature=curvature, **options)
    first = lambda batch: [batch]  # which samples alone are
    alone = prune(model(), batches(x, y, 1), curvature=curvature, **options, batch_fn=first)
    assert_alike(together, alone)


class Repeated(Net):
    """Outputs whose shape depends on the batch."""

    def forward(self, x):
        outputs = super().forward(x)
        return outputs, outputs[:, None].expand(-1, len(x), -1)


@pytest.mark.parametrize("curvature", OF_INPUTS)
def test_outputs_of_another_shape_for_a_single_sample_are_told(curvature, data):
    x, y = data
    options = {} if curvature.startswith("layerwise") else {"labels": "data"}
    options["loss_fn"] = lambda outputs, targets: F.cross_entropy(outputs[0], targets)
    with pytest.warns(UserWarning, match="one by one, which is slower: the outputs.* are of another shape"):
        together = prune(Repeated(), data, curvature=curvature, **options)
    first = lambda batch: [batch]
    alone = prune(Repeated(), batches(x, y, 1), curvature=curvature, **options, batch_fn=first)
    assert_alike(together, alone)


class Sometimes(Net):
    def forward(self, x):
        hidden = self.a(x) if bool((x < 9).all()) else self.a(x - x.mean(0)) + self.a(x)
        return self.b(torch.tanh(hidden))


def test_samples_that_only_later_influence_each_other_are_noticed(data):
    x, y = torch.cat([data[0][:8], data[0][:16] + 20]).repeat(4, 1), data[1].repeat(4)  # 64 are run at a time
    x[:64], options = data[0][:1], {"num_grads": 96, "labels": "data"}
    with pytest.warns(UserWarning, match="one by one.*: .*samples influence each other.*in a later batch"):
        prune(Sometimes(), (x, y), curvature="kronecker", **options)
    with pytest.raises(ValueError, match="samples influence each other.*in a later batch.*batch_size=1"):
        prune(Sometimes(), (x, y), curvature="layerwise", num_grads=96)


class TimeFirst(nn.Module):
    """Outputs [T, N, C], with as many positions as samples go through the model together."""

    def __init__(self, positions_first=True):
        super().__init__()
        torch.manual_seed(8)
        self.a, self.b, self.positions_first = nn.Linear(5, 6), nn.Linear(6, 4), positions_first

    def forward(self, x):
        logits = self.b(torch.tanh(self.a(x)))
        return logits.transpose(0, 1) if self.positions_first else logits


@pytest.mark.filterwarnings("ignore:samples are observed one by one")
@pytest.mark.parametrize("options", [{"curvature": "kronecker"}, {"first_order": 1.0}, {"first_order": True}])
def test_a_dimension_as_long_as_the_batch_is_not_taken_for_it(options, generator):
    x = torch.randn(16, 16, 5, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 4, (16, 16), generator=generator)
    loss_fns = (
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.T.flatten()),
        lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten()),
    )
    options = {"labels": "data", "num_grads": 16} | options
    ways = zip((True, False), loss_fns, strict=True)
    results = [prune(TimeFirst(first).double(), (x, y), loss_fn, **options) for first, loss_fn in ways]
    assert_alike(*results)


@pytest.mark.filterwarnings("ignore:samples are observed one by one")
def test_the_first_order_term_is_that_of_samples_alone(data):
    x, y = data[0].double(), data[1]
    together = prune(Standardised().double(), (x, y), first_order=1.0)
    alone = prune(Standardised().double(), batches(x, y, 1), first_order=1.0, batch_fn=lambda batch: [batch])
    assert_alike(together, alone)


class Capacity(Net):
    """Only half of the samples of a batch, at least four, find room."""

    def forward(self, x):
        room = torch.arange(len(x)) < max(4, len(x) // 2)
        return super().forward(x * room[:, None])


@pytest.mark.parametrize("curvature", OF_INPUTS)
def test_samples_that_influence_each_other_in_large_batches_alone(curvature, data):
    if curvature.startswith("layerwise"):
        with pytest.raises(ValueError, match="in a later batch, though not in the first"):
            prune(Capacity(), data, curvature=curvature)
        return
    with pytest.warns(UserWarning, match="one by one.*in a later batch, though not in the first"):
        result = prune(Capacity(), data, curvature=curvature, labels="data")
    alone = prune(Net(), data, curvature=curvature, labels="data")
    assert_alike(result, alone)


@pytest.mark.parametrize("dtype, share", [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.bfloat16, 0.25)])
def test_a_small_unseen_part_is_noticed(dtype, share, data):
    class Hidden(Net):
        def forward(self, x):
            return self.b(torch.tanh(self.a(x) + share * OwnFunction.apply(x.flip(1), self.a.weight)))

    x, y = data
    for curvature in OF_INPUTS:
        with pytest.raises(NotImplementedError, match="inputs of a.weight cannot be observed.*unseen"):
            prune(Hidden().to(dtype), (x.to(dtype), y), curvature=curvature)


def test_outputs_that_cannot_be_looked_at_are_refused(data):
    class Opaque:
        def __init__(self, logits):
            self.logits = lambda: logits

    class Model(Net):
        def forward(self, x):
            return Opaque(super().forward(x))

    for curvature in OF_INPUTS:
        labels = {} if curvature.startswith("layerwise") else {"labels": "data"}
        with pytest.raises(
            NotImplementedError, match="products of a.weight, b.weight cannot be verified.*hold no tensor"
        ):
            prune(Model(), batches(*data, 1), lambda o, t: F.cross_entropy(o.logits(), t), curvature=curvature,
                  batch_fn=lambda batch: [batch], **labels)  # fmt: skip


def test_products_that_the_loss_does_not_depend_on_do_not_count(data):
    """Of an unused branch, and of one without gradients."""

    class Branches(Net):
        def forward(self, x):
            self.a(2 * x)
            F.linear(3 * x, self.a.weight.detach())
            return super().forward(x)

    x, y = data
    options = {"curvature": "kronecker", "labels": "data"}
    results = [prune(model().double(), (x.double(), y), **options) for model in (Branches, Net)]
    assert_alike(*results)


def test_reentrant_checkpoints_are_explained(data):
    class Checkpointed(Net):
        def forward(self, x):
            return self.b(checkpoint(torch.tanh, self.a(x), use_reentrant=True))

    with pytest.raises(NotImplementedError, match=r"cannot be verified.*use_reentrant=False"):
        prune(Checkpointed(), data, curvature="kronecker", labels="data")
