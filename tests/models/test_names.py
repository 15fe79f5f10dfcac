"""Names of tied weights, and errors that say what to do."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as masking

import fishleg_ext
from fishleg_ext import Pruner
from fishleg_ext.curvature import MODELS
from models.functions import (
    OF_INPUTS,
    Net,
    prune,
)


def tied(head_first):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(6)
            emb, head = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
            head.weight = emb.weight
            for name, module in (("head", head), ("emb", emb)) if head_first else (("emb", emb), ("head", head)):
                setattr(self, name, module)
            self.inner = nn.Linear(8, 8)

        def forward(self, ids):
            return self.head(torch.tanh(self.inner(self.emb(ids))))

    return Tied()


@pytest.mark.parametrize("curvature", OF_INPUTS)
def test_an_embedding_that_is_the_head_as_well(curvature, generator):
    ids = torch.randint(0, 12, (24,), generator=generator)
    results = []
    for head_first in (False, True):
        with pytest.warns(UserWarning, match=r"(emb|head).weight is looked up as an embedding as well"):
            results.append(prune(tied(head_first), (ids, ids), curvature=curvature))
    masks = [{name.split(".")[0]: mask for name, mask in result.masks.items()} for result in results]
    assert torch.equal(masks[0]["emb"], masks[1]["head"])
    assert torch.equal(masks[0]["inner"], masks[1]["inner"])


def test_other_names_of_tied_weights_are_known(generator):
    ids = torch.randint(0, 12, (24,), generator=generator)
    result = prune(tied(False), (ids, ids), sparsity=None, scope={"head.weight": 0.25})
    assert result.layer_sparsity == {"emb.weight": 0.25, "inner.weight": 0}
    pruner = Pruner(tied(False), masks={"head.weight": result.masks["emb.weight"]}, num_grads=24, progress=False)
    pruner.apply_masks()
    assert list(pruner.masks) == ["emb.weight"]
    pruner.estimate([(ids, ids)])
    assert pruner.prune_to({"head.weight": 0.5}).sparsity == 0.5


def test_errors_say_what_to_do(data):
    for options, error, match in (
        ({"loss_fn": nn.CrossEntropyLoss}, TypeError, r"got the class CrossEntropyLoss: an instance of it"),
        ({"loss_fn": lambda o, t: {"loss": F.cross_entropy(o, t)}}, TypeError, "return a scalar tensor, got a dict"),
        ({"loss_fn": lambda o, t: 0.5}, TypeError, "return a scalar tensor, got a float"),
        ({"params": Net().a}, TypeError, "got the module Linear: give the names of its parameters"),
        ({"seed": None}, TypeError, "seed to be an integer, got None"),
    ):
        for curvature in ("block", "kronecker"):
            with pytest.raises(error, match=match):
                prune(Net(), data, curvature=curvature, **{"labels": "data"} | options)
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Sequential(nn.Linear(8, 0), nn.Linear(0, 3))
    for curvature in MODELS:
        with pytest.raises(ValueError, match="found empty ones alone"):
            prune(empty, data, curvature=curvature)
        with pytest.raises(ValueError, match=r"expected 0.weight to hold weights, got a tensor of shape \[0, 8\]"):
            prune(empty, data, curvature=curvature, params="0.weight")


def test_a_loss_without_a_gradient_is_told(data):
    metric = lambda outputs, targets: (outputs.argmax(1) == targets).float().mean()
    for curvature in ("block", "kronecker"):
        with pytest.warns(UserWarning, match="every gradient is zero: does the loss fit the model's outputs"):
            prune(Net(), data, metric, curvature=curvature, labels="data")


def test_layers_that_are_left_out_are_named(data):
    computed = Net()
    nn.utils.parametrizations.weight_norm(computed.a)
    masked = Net()
    masking.l1_unstructured(masked.a, "weight", 0.5)
    for model, match in (
        (computed, "a.weight is computed from a.parametrizations.weight.original0, .*original1, which params can name"),
        (masked, "a.weight is masked by torch.nn.utils.prune; torch.nn.utils.prune.remove makes it a parameter"),
    ):
        with pytest.warns(UserWarning, match=f"these layers stay dense: {match}"):
            result = prune(model, data)
        assert list(result.masks) == ["b.weight"]
        assert any("a.weight is" in why for why in result.dense.values())
        assert "a.weight is" in result.table()
        alone = nn.Sequential(model.a)
        with pytest.raises(ValueError, match="found 0.weight is"):
            prune(alone, data)


def test_adapters_stay_dense_by_default_with_a_word():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    x, y = torch.randn(24, 8), torch.randint(3, (24,))
    before = {name: p.detach().clone() for name, p in adapted.named_parameters() if "lora" in name}
    assert len(before) == 2
    options = {"curvature": "layerwise", "sparsity": 0.5, "num_grads": 24, "progress": False}
    with pytest.warns(UserWarning, match=r"2 parameters of adapters, such as \S+lora_A\S+, which params can name"):
        result = fishleg_ext.prune(adapted, [(x, y)], **options)
    assert len(result.masks) == 2
    assert all(torch.equal(adapted.get_parameter(name), values) for name, values in before.items())
    assert all("it is of an adapter of" in result.dense[name] for name in before)
    named = fishleg_ext.prune(adapted, [(x, y)], params=[*before], **options)
    assert named.masks.keys() == before.keys()
