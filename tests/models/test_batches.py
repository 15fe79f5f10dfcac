"""Batches and outputs as other people have them; each with the right value, computed otherwise."""

import copy
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import batches
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext import Pruner
from fishleg_ext.curvature import MODELS
from models.functions import (
    Net,
    assert_alike,
    prune,
)


def test_batches_of_other_lengths(generator):
    class Pool(Net):
        def forward(self, x):
            return super().forward(x.mean(1))

    x = [torch.randn(4, length, 8, generator=generator) for length in (7, 7, 9)]
    y = torch.randint(0, 3, (12,), generator=generator)
    data = [(part, y[4 * i : 4 * i + 4]) for i, part in enumerate(x)]
    singles = [(part[i : i + 1], y[4 * k + i, None]) for k, part in enumerate(x) for i in range(4)]
    for curvature in MODELS:
        options = {"num_grads": 12, "curvature": curvature}
        assert_alike(prune(Pool(), data, **options), prune(Pool(), singles, **options))


class Encoding(UserDict):
    """A mapping that is no dict, as a BatchEncoding."""


class Keywords(Net):
    def forward(self, x, mask=None, flag=True):
        assert flag is False
        assert mask is None
        return super().forward(x)


@pytest.mark.parametrize("curvature", MODELS)
def test_what_is_no_tensor_is_passed_on(curvature, data):
    x, y = data
    given = [(Encoding(x=part, mask=None, flag=False), targets) for part, targets in batches(x, y, 5)]
    assert_alike(prune(Keywords(), given, curvature=curvature), prune(Net(), data, curvature=curvature))


@dataclass
class Outputs:
    loss: torch.Tensor
    logits: torch.Tensor
    cache: Any = None


class OwnLoss(Net):
    def forward(self, x, labels=None):
        logits = super().forward(x)
        return Outputs(None if labels is None else F.cross_entropy(logits, labels), logits, cache=object())


@pytest.mark.filterwarnings("ignore:samples are observed one by one")
@pytest.mark.parametrize("curvature", MODELS)
def test_a_mapping_for_a_model_that_returns_its_own_loss(curvature, data):
    x, y = data
    mappings = [Encoding(x=part, labels=targets) for part, targets in batches(x, y, 7)]
    options = {"curvature": curvature} | (
        {} if curvature in ("identity", "layerwise", "layerwise_diagonal") else {"labels": "data"}
    )
    own = prune(OwnLoss(), mappings, None, **{key: value for key, value in options.items() if key != "labels"})
    assert_alike(own, prune(Net(), data, **options))
    pairs = [({"x": x}, y)]
    assert_alike(own, prune(OwnLoss(), pairs, None, curvature=curvature))
    if "labels" not in options:  # which are not needed then
        assert_alike(own, prune(OwnLoss(), [{"x": x}], None, curvature=curvature))


@pytest.mark.filterwarnings("ignore:samples are observed one by one")
@pytest.mark.parametrize("curvature", ["block", "kronecker", "fishleg"])
def test_labels_of_a_model_that_returns_its_own_loss(curvature, data):
    x, y = data[0].double(), data[1]
    options = {"curvature": curvature, "labels": "model"}
    own = prune(OwnLoss().double(), [{"x": x, "labels": y}], None, **options)
    if curvature == "kronecker":  # which draws for one sample after the other
        assert own.predicted_loss_increase > 0
    else:
        assert_alike(own, prune(Net().double(), [(x, y)], **options))


def test_a_mapping_wants_its_loss_named(data):
    x, y = data
    with pytest.raises(ValueError, match="one dict a batch: give loss_fn=None"):
        prune(OwnLoss(), [{"x": x, "labels": y}])
    with pytest.raises(ValueError, match="model whose outputs have a loss, with loss_fn=None, got Outputs"):
        prune(OwnLoss(), [{"x": x}], None)
    with pytest.raises(TypeError, match="mapping of inputs with loss_fn=None.*got Tensor"):
        prune(OwnLoss(), [(x, y)], None)


class Detector(Net):
    """Takes lists of inputs of different sizes, as detection models do."""

    def forward(self, images, targets=None):
        return torch.stack([super(Detector, self).forward(image).mean(0) for image in images])


@pytest.mark.parametrize("curvature", MODELS)
def test_samples_that_cannot_be_put_together_come_through_batch_fn(curvature, generator):
    images = [torch.randn(2 + i % 3, 8, generator=generator) for i in range(12)]
    labels = torch.randint(0, 3, (12,), generator=generator).tolist()
    loss_fn = lambda outputs, targets: F.cross_entropy(outputs, torch.tensor([t["label"] for t in targets]))
    loader = [(images[i : i + 4], labels[i : i + 4]) for i in range(0, 12, 4)]
    one_each = lambda batch: [(([image],), [{"label": label}]) for image, label in zip(*batch, strict=True)]
    options = {"curvature": curvature, "num_grads": 12, "sparsity": 0.5, "progress": False}
    if MODELS[curvature]().observes - {"inputs"}:
        options["labels"] = "data"
    net = Detector()
    result = fishleg_ext.prune(net, loader, loss_fn, batch_fn=one_each, **options)

    class Rows(Net):
        def forward(self, x):
            return super().forward(x).mean(1)

    singles = [(image[None], torch.tensor([label])) for image, label in zip(images, labels, strict=True)]
    assert_alike(result, fishleg_ext.prune(Rows(), singles, F.cross_entropy, **options))
    pairs = lambda batch: (batch["x"], batch["y"])
    x, y = torch.randn(12, 8, generator=generator), torch.tensor(labels)
    adapted = fishleg_ext.prune(Net(), [{"x": x, "y": y, "name": "?"}], batch_fn=pairs, **options)
    assert_alike(adapted, fishleg_ext.prune(Net(), [(x, y)], **options))


Pair = namedtuple("Pair", ["logits", "more"])


@pytest.mark.parametrize("curvature", MODELS)
@pytest.mark.parametrize("more", [None, "a cache", object()])
@pytest.mark.parametrize(
    "kind", [tuple, Pair._make, lambda pair: Outputs(None, *pair), lambda pair: dict(enumerate(pair))]
)
def test_outputs_of_many_kinds(kind, more, curvature, data):
    class Model(Net):
        def forward(self, x):
            return kind([super().forward(x), more])

    logits = lambda outputs: outputs.logits if hasattr(outputs, "logits") else outputs[0]
    options = {"curvature": curvature} | ({"labels": "data"} if MODELS[curvature]().observes - {"inputs"} else {})
    result = prune(Model(), data, lambda o, t: F.cross_entropy(logits(o), t), **options)
    assert_alike(result, prune(Net(), data, **options))


def test_a_loss_that_needs_a_number_of_the_batch_is_taken_sample_by_sample(data):
    class Auxiliary(Net):
        def forward(self, x):
            logits = super().forward(x)
            return logits, logits.square().mean()

    loss_fn = lambda o, t: F.cross_entropy(o[0], t) + o[1]
    alike = lambda o, t: F.cross_entropy(o, t) + o.square().mean()
    with pytest.warns(
        UserWarning, match=r"one by one.*the loss needs \[1\], a tensor of shape \[\], which cannot be cut"
    ):
        result = prune(Auxiliary(), data, loss_fn, curvature="kronecker", labels="data")
    assert_alike(result, prune(Net(), data, alike, curvature="kronecker", labels="data"))


class InPlace(Net):
    def forward(self, x):
        x -= 1
        x *= 2
        return super().forward(x)


@pytest.mark.parametrize("options", [{}, {"labels": "model"}, {"first_order": True}, {"curvature": "fishleg"},
                                     {"curvature": "kronecker"}, {"curvature": "layerwise"}])  # fmt: skip
def test_inputs_that_the_model_changes(options, data):
    x, y = data
    plain = Net()
    changed = prune(InPlace(), data, **options)
    assert_alike(changed, prune(plain, ((x - 1) * 2, y), **options))


@pytest.mark.parametrize("curvature", MODELS)
def test_inputs_and_buffers_are_left_as_they_were(curvature, data):
    class Counting(nn.Sequential):
        def __init__(self):
            super().__init__(nn.ReLU(inplace=True), nn.Linear(8, 3))
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(3))

        def forward(self, x):
            if not torch._C._functorch.is_functorch_wrapped_tensor(x):
                self.calls += 1
                self.last = x[0, :3].detach().clone()
            return super().forward(x)

    x, y = data
    before, model = x.clone(), Counting()
    last = model.last
    prune(model, [(x, y)], curvature=curvature)
    assert torch.equal(x, before)
    assert model.calls == 0
    assert model.last is last
    assert not last.any()


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
def test_an_embedding_that_is_renormalised_by_its_forward_pass_is_as_before(generator):
    ids = torch.randint(0, 9, (24,), generator=generator)
    model = nn.Sequential(nn.Embedding(9, 8, max_norm=0.5), Net())
    before = model[0].weight.detach().clone()
    for curvature in ("layerwise", "block"):
        prune(copy.deepcopy(model), (ids, ids % 3), curvature=curvature)
        prune(model, (ids, ids % 3), curvature=curvature, params="1.b.weight")
        assert torch.equal(model[0].weight, before)
    with torch.no_grad():
        model(ids)
    assert not torch.equal(model[0].weight, before)


def test_inside_inference_mode(data):
    model = Net()
    expected = prune(copy.deepcopy(model), data, curvature="kronecker")
    with torch.inference_mode():
        result = prune(model, data, curvature="kronecker")
        assert_alike(result, expected)
        with pytest.raises(ValueError, match=r"a.weight was made in torch.inference_mode\(\)"):
            Pruner(Net())
    F.cross_entropy(model(data[0]), data[1]).backward()
