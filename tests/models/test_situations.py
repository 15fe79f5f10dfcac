"""Models, batches, labels and optimizers as other people have them; each with the right value, computed otherwise."""

import copy
import functools
import pickle
from collections import UserDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from oracles import batches
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune as masking
from torch.utils.checkpoint import checkpoint

import fishleg_ext
from fishleg_ext import Pruner
from fishleg_ext.curvature import MODELS, CurvatureError, Kronecker
from models.functions import Experts, SharedRows, Tokens

OF_INPUTS = ["layerwise", "kronecker"]
OF_GRADIENTS = [name for name in MODELS if name not in OF_INPUTS]


class Net(nn.Module):
    def __init__(self, between=torch.tanh):
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


@pytest.fixture
def data(generator):
    return torch.randn(24, 8, generator=generator), torch.randint(0, 3, (24,), generator=generator)


def prune(model, data, loss_fn=F.cross_entropy, **options):
    data = data if isinstance(data, list) else [data]
    return fishleg_ext.prune(model, data, loss_fn, **{"sparsity": 0.5, "num_grads": 24, "progress": False} | options)


def assert_alike(first, second):
    """Two results, of the same function with parameters of other names."""
    for a, b in zip(first.masks.values(), second.masks.values(), strict=True):
        assert torch.equal(a, b)
    assert first.predicted_loss_increase == pytest.approx(second.predicted_loss_increase, rel=1e-6)


# the same function in different ways


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


# what cannot be observed


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
    options = {} if curvature == "layerwise" else {"labels": "data"}
    with pytest.warns(UserWarning, match=f"samples are observed one by one, which is slower: .*{why}"):
        together = prune(model(), data, curvature=curvature, **options)
    first = lambda batch: [batch]  # which samples alone are
    alone = prune(model(), batches(x, y, 1), curvature=curvature, **options, batch_fn=first)
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
    if curvature == "layerwise":
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
        with pytest.raises(
            NotImplementedError, match="products of a.weight, b.weight cannot be verified.*hold no tensor"
        ):
            prune(Model(), batches(*data, 1), lambda o, t: F.cross_entropy(o.logits(), t), curvature=curvature,
                  batch_fn=lambda batch: [batch], **{} if curvature == "layerwise" else {"labels": "data"})  # fmt: skip


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


# labels


class Segments(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.h = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.h(torch.tanh(self.a(x))).transpose(1, 2)  # [N, C, T]


@pytest.mark.parametrize("ignored", [-100, 7])
def test_labels_are_not_drawn_where_targets_are_ignored(ignored, generator):
    """One position of five is left, for which the trace of the Fisher matrix of the head is written out."""
    x = torch.randn(4000, 5, 4, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (4000, 5), generator=generator)
    x[:, 1:], y[:, 1:] = 3, ignored
    model = Segments().double()
    loss_fn = F.cross_entropy if ignored == -100 else nn.CrossEntropyLoss(ignore_index=ignored)
    pruner = Pruner(model, curvature="diagonal", labels="model", num_grads=4000, progress=False)
    pruner.estimate([(x, y)], loss_fn)
    with torch.no_grad():
        hidden = torch.tanh(model.a(x[:, 0]))
        p = model.h(hidden).softmax(1)
    expected = float(((1 - p.square().sum(1)) * hidden.square().sum(1)).mean())
    assert float(pruner.curvature._squares["h.weight"].sum()) / 4000 == pytest.approx(expected, rel=0.02)


class LanguageModel(nn.Module):
    def __init__(self, shape=lambda z: z):
        super().__init__()
        torch.manual_seed(2)
        self.e, self.h, self.shape = nn.Embedding(11, 8), nn.Linear(8, 11), shape

    def forward(self, ids):
        return self.shape(self.h(self.e(ids)))


def flat_loss(outputs, targets):
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


@pytest.mark.parametrize("length", [6, 11])
def test_classes_in_the_last_dimension(length, generator):
    ids = torch.randint(0, 11, (24, length), generator=generator)
    options = {"labels": "model", "curvature": "diagonal"}
    with pytest.raises(ValueError, match="'tokens' and 'next_token'"):
        prune(LanguageModel(), (ids, ids), flat_loss, likelihood="categorical", **options)
    tokens = prune(LanguageModel(), (ids, ids), flat_loss, likelihood="tokens", **options)
    moved = prune(LanguageModel(lambda z: z.mT), (ids, ids), **options)
    assert_alike(tokens, moved)


def test_the_next_token_is_drawn_from_its_own_logits(generator):
    ids = torch.randint(0, 11, (400, 5), generator=generator)
    ids[:, -1] = -100
    sampler = fishleg_ext.observation.likelihoods.label_sampler("model", flat_loss, "next_token")
    logits = torch.full((400, 5, 11), -50.0)
    wanted = torch.randint(0, 11, (400, 5), generator=generator)
    logits.scatter_(2, wanted[..., None], 50.0)
    drawn, factor = sampler.draw(generator, logits, ids, 400, 400)
    assert torch.equal(drawn[:, 0], ids[:, 0])
    assert torch.equal(drawn[:, 1:4], wanted[:, :3])
    assert (drawn[:, 4] == -100).all()
    assert (torch.as_tensor(factor) == 3**0.5).all()


def test_drawn_labels_that_the_loss_does_not_read_are_an_error(data):
    own = lambda outputs, generator: torch.randint(0, 3, (len(outputs),), generator=generator)
    options = {"labels": "model", "likelihood": own}
    for curvature in ("block", "kronecker"):
        with pytest.raises(ValueError, match="the loss does not depend on the targets that labels='model' draws"):
            prune(Net(), data, lambda outputs, _: outputs.square().mean(), curvature=curvature, **options)
        prune(Net(), data, curvature=curvature, **options)


@pytest.mark.parametrize("curvature", ["block", "kronecker", "fishleg"])
def test_class_weights_multiply_the_loss_of_a_sample(curvature, data):
    weight = torch.tensor([100.0, 1.0, 1.0])
    written_out = lambda o, t: (weight[t] * F.cross_entropy(o, t, reduction="none")).mean()
    options = {"curvature": curvature, "labels": "data", "damping": 1e-2}
    results = [
        prune(Net(), data, f, **options) for f in (nn.CrossEntropyLoss(weight=weight), written_out, F.cross_entropy)
    ]
    assert_alike(results[0], results[1])
    assert results[0].predicted_loss_increase != pytest.approx(results[2].predicted_loss_increase, rel=0.1)
    with pytest.raises(ValueError, match=r"labels='model' cannot be combined with CrossEntropyLoss\(weight=...\)"):
        prune(Net(), data, nn.CrossEntropyLoss(weight=weight), labels="model")
    partial = functools.partial(F.cross_entropy, weight=weight)
    assert_alike(prune(Net(), data, partial, **options), results[1])
    likelihoods = nn.Sequential(Net(), nn.LogSoftmax(1)), nn.Sequential(Net(), nn.Identity())
    losses = nn.NLLLoss(weight=weight), nn.CrossEntropyLoss(weight=weight)
    assert_alike(*(prune(net, data, loss, **options) for net, loss in zip(likelihoods, losses, strict=True)))


@pytest.mark.parametrize("labels", ["data", "model"])
@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss, nn.MSELoss])
def test_sums_over_samples_are_means(loss, labels, data):
    x, y = data
    likelihood = "gaussian" if loss is nn.MSELoss and labels == "model" else None
    targets = F.one_hot(y, 3).float() if loss is nn.MSELoss else y
    options = {
        "grad_batch_size": 4,
        "num_grads": 6,
        "labels": labels,
        "likelihood": likelihood,
        "curvature": "diagonal",
    }
    scale = 3 if loss is nn.MSELoss else 1  # a sum over three outputs, where the mean divides
    totals = []
    for reduction in ("sum", "mean"):
        pruner = Pruner(Net(), progress=False, **options)
        pruner.estimate([(x, targets)], loss(reduction=reduction))
        totals.append(float(pruner.curvature._squares["a.weight"].sum()))
    power = 2 if labels == "data" else 1 + (loss is nn.MSELoss) * 0
    assert totals[0] == pytest.approx(totals[1] * scale**power, rel=1e-4)


# batches and outputs


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
    options = {"curvature": curvature} | ({} if curvature in ("identity", "layerwise") else {"labels": "data"})
    own = prune(OwnLoss(), mappings, None, **{key: value for key, value in options.items() if key != "labels"})
    assert_alike(own, prune(Net(), data, **options))
    pairs = [({"x": x}, y)]
    assert_alike(own, prune(OwnLoss(), pairs, None, curvature=curvature))
    if "labels" not in options:  # which are not needed then
        assert_alike(own, prune(OwnLoss(), [{"x": x}], None, curvature=curvature))


@pytest.mark.filterwarnings("ignore:samples are observed one by one")
@pytest.mark.parametrize("curvature", ["block", "kronecker", "fishleg"])
def test_labels_of_a_model_that_returns_its_own_loss(curvature, data):
    x, y = data
    options = {"curvature": curvature, "labels": "model"}
    own = prune(OwnLoss(), [{"x": x, "labels": y}], None, **options)
    if curvature == "kronecker":  # which draws for one sample after the other
        assert own.predicted_loss_increase > 0
    else:
        assert_alike(own, prune(Net(), data, **options))


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


# names and errors


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


# optimizers


class Wrapper(torch.optim.Optimizer):
    """Is no optimizer but in name, and steps the one inside, as accelerate's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value):
        pass

    def step(self):
        self.optimizer.step()


def keeps_zeros(model, pruner, optimizer, data):
    pruner.estimate([data], F.cross_entropy)
    masks = pruner.prune_to(0.5).masks
    for _ in range(3):
        F.cross_entropy(model(data[0]), data[1]).backward()
        optimizer.step()
        assert not any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())
    pruner.finalize()
    optimizer.step()
    assert any(model.get_parameter(name)[~mask].any() for name, mask in masks.items())


def test_a_wrapped_optimizer_keeps_zeros(data):
    model = Net()
    pruner, optimizer = Pruner(model, num_grads=24, progress=False), Wrapper(torch.optim.SGD(model.parameters(), 0.1))
    pruner.attach(optimizer)
    keeps_zeros(model, pruner, optimizer, data)
    optimizer.optimizer = None
    with pytest.raises((TypeError, AttributeError)):
        pruner.attach(optimizer)


def test_accelerate(data):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = Net()
    pruner = Pruner(model, num_grads=24, progress=False)
    prepared, optimizer = accelerate.Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    pruner.attach(optimizer)
    keeps_zeros(prepared, pruner, optimizer, data)


def test_a_pruner_is_pickled_while_it_is_attached(data):
    model = Net()
    pruner, optimizer = Pruner(model, num_grads=24, progress=False), torch.optim.SGD(model.parameters(), 0.1)
    pruner.attach(optimizer)
    again = pickle.loads(pickle.dumps(pruner))
    other = torch.optim.SGD(again.model.parameters(), 0.1)
    again.attach(other)
    keeps_zeros(again.model, again, other, data)
