"""The same function, written in different ways, is pruned alike by every curvature."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner
from fishleg_ext.curvature import MODELS, CurvatureError, Kronecker
from models.functions import (
    OF_GRADIENTS,
    Experts,
    Net,
    Tokens,
    assert_alike,
    prune,
)


@pytest.mark.parametrize("curvature", MODELS)
@pytest.mark.parametrize("how", ["flat", "positions first", "one by one", "einsum"])
def test_the_way_in_which_a_layer_is_called_does_not_matter(how, curvature, generator):
    x, y = torch.randn(40, 6, 8, generator=generator), torch.randint(0, 3, (40,), generator=generator)
    data = (x.double(), y)
    plain, other = (prune(Tokens(way).double(), data, curvature=curvature) for way in ("plain", how))
    assert_alike(plain, other)


@pytest.mark.parametrize("how", ["plain", "flat", "positions first"])
def test_factors_of_layers_have_the_mean_squared_gradient(how, generator):
    """tr S tr A is about E|G|^2, whose value is taken sample by sample."""
    x, y = torch.randn(200, 6, 8, generator=generator).double(), torch.randint(0, 3, (200,), generator=generator)
    model = Tokens(how).double()
    pruner = Pruner(model, curvature=Kronecker(labels="data"), num_grads=200, progress=False)
    pruner.estimate([(x, y)], F.cross_entropy)
    state = pruner.curvature.state_dict()
    of_outputs, of_inputs = state["counts"]["a.weight"]
    trace = state["row"]["a.weight"].sum() / of_outputs * state["col"]["a.weight"].diagonal()[:8].sum() / of_inputs
    squares = 0.0
    for i in range(200):
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), model.a.weight)
        squares += float(gradient.square().sum()) / 200
    assert float(trace) == pytest.approx(squares, rel=0.02)


class Shared(nn.Module):
    def __init__(self, modules):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.c = nn.Linear(8, 8), nn.Linear(8, 3)
        self.b = nn.Linear(8, 8) if modules == 2 else self.a
        self.b.weight, self.b.bias = self.a.weight, self.a.bias

    def forward(self, x):
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


@pytest.mark.parametrize("curvature", MODELS)
def test_two_modules_that_share_a_weight_are_one_called_twice(curvature, data):
    x, y = data
    assert_alike(*(prune(Shared(modules).double(), (x.double(), y), curvature=curvature) for modules in (1, 2)))


class SamePadding(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(F.pad(x, (0, 1, 0, 1)), self.weight, self.bias, self.stride)


@pytest.mark.parametrize("curvature", MODELS)
def test_a_subclass_may_pad_its_inputs_itself(curvature, generator):
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(36, 3)]
    own = nn.Sequential(nn.Identity(), SamePadding(2, 4, 3, stride=2), *head).double()
    plain = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(2, 4, 3, stride=2), *head).double()
    plain[1].load_state_dict(own[1].state_dict())
    x = torch.randn(24, 2, 6, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    assert_alike(*(prune(copy.deepcopy(net), (x, y), curvature=curvature) for net in (own, plain)))


@pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")
@pytest.mark.parametrize("curvature", OF_GRADIENTS)
@pytest.mark.parametrize("how", ["all", "skipped"])
def test_experts_that_are_skipped_have_zero_gradients(how, curvature, generator):
    x = torch.randn(24, 4, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    options = {"curvature": curvature, "params": ["experts", "head.weight"]}
    assert_alike(*(prune(Experts(way).double(), (x, y), **options) for way in ("masked", how)))


def test_experts_count_by_their_share_of_tokens(generator):
    """A and S of an expert weight: of the tokens that went through it, over the samples of the network."""
    x = torch.randn(24, 4, 8, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (24,), generator=generator)
    model = Experts("skipped", used=3).double()
    linears = nn.ModuleList(nn.Linear(8, 8, bias=False).double() for _ in range(3))
    for expert, linear in enumerate(linears):
        linear.weight.data.copy_(model.experts[expert])
    model.experts, model.each = None, linears

    def forward(x):
        choice, y = (x[..., 0] * 100).long() % 3, torch.zeros_like(x)
        for e in range(3):
            if bool((choice == e).any()):
                y = y.index_put((choice == e).nonzero(as_tuple=True), model.each[e](x[choice == e]))
        return model.head(torch.tanh(y).mean(1))

    model.forward = forward
    pruner = Pruner(model, curvature="kronecker", labels="data", num_grads=24, progress=False)
    pruner.estimate([(x, y)])
    state = pruner.curvature.state_dict()
    for expert in range(3):
        tokens = x[(x[..., 0] * 100).long() % 3 == expert]
        name = f"each.{expert}.weight"
        torch.testing.assert_close(state["col"][name], tokens.mT @ tokens)
        assert state["counts"][name] == [len(tokens), 24]


def test_an_expert_without_tokens_has_no_inputs(data):
    class Idle(Net):
        def __init__(self):
            super().__init__()
            self.expert = nn.Linear(8, 8)

        def forward(self, x):
            hidden = torch.tanh(self.a(x))
            none = x[:, 0] > 1e9
            return self.b(hidden.index_put((none.nonzero()[:, 0],), self.expert(hidden[none])))

    with pytest.raises(CurvatureError, match="expert.weight: its layer was not called.*has no inputs"):
        prune(Idle(), data, curvature="layerwise")
