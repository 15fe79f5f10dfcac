"""What the optimizer sees of the user's own forward and backward passes."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner
from fishleg_ext.optim import FishLeg, drawn
from optim.problems import Tied, backward, train

pytestmark = pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")  # nn.GRU


def test_factors_of_the_gradient_give_the_same_step(problem, monkeypatch):
    """Of passes that are accumulated and clipped as well; what was changed otherwise is multiplied out."""
    first, x, y = problem
    second = copy.deepcopy(first)
    taken = []
    for net, factored in ((first, True), (second, False)):
        optimizer = FishLeg(net, likelihood="categorical", samples=4)
        factors = optimizer._forward.factors

        def kept(matrices, factors=factors, factored=factored):
            found = factors(matrices)
            taken.append(set(found))
            return found if factored else {}

        monkeypatch.setattr(optimizer._forward, "factors", kept)
        for step in range(4):
            size = 1 if step == 1 else 2
            backward(net, x[:size], y[:size])
            if step == 1:  # accumulated
                F.cross_entropy(net(x[2:3]), y[2:3]).backward()
            if step == 2:
                nn.utils.clip_grad_norm_(net.parameters(), 1e-3)
            if step == 3:
                for p in net.parameters():
                    p.grad += torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
            optimizer.step()
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9, msg=name)
    linear = any(isinstance(module, nn.Linear) for module in first.modules())
    assert [bool(found) for found in taken[:4]] == ([True, True, True, False] if linear else [False] * 4)


def test_a_forward_pass_without_a_backward_pass_does_no_harm(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(50, 40), nn.Linear(40, 3)).double()
    x, y = torch.randn(4, 50, generator=generator).double(), torch.arange(4) % 3
    twin = copy.deepcopy(net)
    for model, extra in ((net, False), (twin, True)):
        optimizer = FishLeg(model, likelihood="categorical")
        for _ in range(3):
            if extra:
                model(x[:2] + 1)
            backward(model, x, y)
            if extra:
                with torch.no_grad():
                    model(x + 1)
            optimizer.step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


def test_steps_leave_the_model_its_mode_buffers_and_random_numbers(problem):
    net, x, y = problem
    net.train()
    optimizer = FishLeg(net, likelihood="categorical")
    backward(net, x, y)
    buffers = copy.deepcopy(dict(net.named_buffers()))
    state = torch.get_rng_state()
    grads = [p.grad.clone() for p in net.parameters()]
    optimizer.step()
    assert net.training
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in net.named_buffers():
        assert torch.equal(buffer, buffers[name])
    for p, grad in zip(net.parameters(), grads, strict=True):
        assert torch.equal(p.grad, grad)


@pytest.mark.parametrize("training", [True, False])
def test_labels_are_drawn_from_the_outputs_of_training(training, generator):
    """BatchNorm has the statistics of the batch, or the running ones where training has them."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.0), nn.Flatten(), nn.Linear(16, 3)).double()
    net.train(training)
    seen = []

    def likelihood(outputs, generator):
        seen.append(outputs)
        return outputs.argmax(1)

    x, y = 3 + torch.randn(64, 2, 4, 4, generator=generator).double(), torch.arange(64) % 3
    optimizer = FishLeg(net, likelihood=likelihood, loss_fn=F.cross_entropy)
    expected = net(x)
    F.cross_entropy(expected, y).backward()
    optimizer.step()
    by_length = {len(outputs): outputs for outputs in seen}
    for times in (1, 2):  # once for what is no matrix; twice else, to learn from and to measure by
        outputs, tolerance = by_length[64 * times], 3e-3 if training else 1e-9  # n - 1
        torch.testing.assert_close(outputs, torch.cat([expected.detach()] * times), rtol=0, atol=tolerance)


def test_models_that_take_keywords_and_return_logits(generator):
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x, mask=None, labels=None):
            return Output(self.layer(x * mask))

    torch.manual_seed(0)
    net, x, y = Named(), torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    before = net.layer.weight.detach().clone()
    F.cross_entropy(net(x, mask=torch.ones(8, 4), labels=y).logits, y).backward()
    optimizer.step()
    assert not torch.equal(net.layer.weight, before)


def test_what_it_has_of_each_parameter_is_said(generator):
    torch.manual_seed(0)
    net = Tied()
    optimizer = FishLeg(net, likelihood="tokens")
    assert optimizer.structure == {
        "scale": "diagonal",
        "embedding.weight": "diagonal",
        "norm.weight": "diagonal",
        "norm.bias": "diagonal",
        "hidden.weight": "kronecker",
        "hidden.bias": "bias of hidden.weight",
    }
    tokens = torch.randint(11, (6, 5), generator=generator)
    loss = lambda: F.cross_entropy(net(tokens).movedim(-1, 1), (tokens + 1) % 11)
    before = loss().item()
    for _ in range(10):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.7 * before


@pytest.mark.parametrize("penalty", [1e-5, 1e-4, 1e-3])
def test_a_small_penalty_beside_the_products_is_not_lost(penalty):
    """What D^T X lacks of a gradient in float32, where it is close to it, is where the inverse is largest."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(200, 100), nn.Tanh(), nn.Linear(100, 10))
    x, y = torch.randn(4, 200, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    optimizer = FishLeg(net, likelihood="categorical", momentum=0.0)
    for step in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y)
        (loss + penalty * sum(p.square().sum() for p in net.parameters())).backward()
        optimizer.step()
        for layer in optimizer._layers:
            gradient = layer.matrix({name: p.grad for name, p in layer.parameters.items()})
            moved = layer.matrix({name: optimizer.state[p]["momentum"] for name, p in layer.parameters.items()})
            expected = layer.running.row @ gradient @ layer.running.col
            assert (moved - expected).norm() < 1e-3 * expected.norm(), step


def test_passes_of_others_are_not_seen(generator):
    """Neither those of another optimizer of the model, nor of a pruner, between the backward pass and the step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 3
    optimizers = [FishLeg(net, likelihood="categorical", params=part.parameters(), samples=4) for part in net]
    pruner = Pruner(net, curvature="fishleg", params="re:weight", num_grads=8, progress=False)
    backward(net, x, y)
    for optimizer in optimizers:
        pruner.estimate([(x[:8], y[:8])], F.cross_entropy)
        optimizer.step()
        assert torch.equal(optimizer._forward.called[0][0], x)


def test_an_optimizer_that_is_gone_leaves_no_hooks(generator):
    torch.manual_seed(0)
    net = nn.Linear(40, 30)
    optimizer = FishLeg(net, likelihood="gaussian")
    for _ in range(200):  # of another optimizer, say
        net(torch.randn(2, 40, generator=generator)).sum().backward()
    assert len(optimizer._forward._seen) <= 64
    del optimizer
    gc.collect()
    net(torch.randn(2, 40, generator=generator))
    assert not net._forward_pre_hooks
    assert not net._forward_hooks


def test_values_that_were_put_in_place_are_those_observed(generator):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x, y = torch.randn(16, 4, generator=generator), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    train(net, optimizer, x, y, 2)
    nn.utils.vector_to_parameters(torch.zeros(15), net.parameters())
    backward(net, x, y)
    seen = []
    draw = optimizer._labels._sampler.draw
    optimizer._labels._sampler.draw = lambda g, outputs, *args: seen.append(outputs) or draw(g, outputs, *args)
    optimizer.step()
    assert (seen[-1] == 0).all()


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias"])
def test_what_has_no_gradient_does_not_move(frozen, generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(16, 4, generator=generator), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical", weight_decay=0.1)
    net.get_parameter(frozen).requires_grad_(False)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, x, y, 2)
    for name, value in before.items():
        assert torch.equal(net.state_dict()[name], value) == (name == frozen)


@pytest.mark.parametrize("how", ["by position", "by name", "labels"])
def test_next_tokens(how, generator):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(11, 6), nn.Linear(6, 11)

        def forward(self, ids, labels=None):
            return self.head(self.embedding(ids))

    torch.manual_seed(0)
    net, ids = Model(), torch.randint(11, (6, 5), generator=generator)
    optimizer = FishLeg(net, likelihood="next_token")
    outputs = {"by position": lambda: net(ids), "by name": lambda: net(ids=ids), "labels": lambda: net(ids, ids)}[how]()
    F.cross_entropy(outputs[:, :-1].movedim(-1, 1), ids[:, 1:]).backward()
    before = net.head.weight.detach().clone()
    optimizer.step()
    assert not torch.equal(net.head.weight, before)


def test_gradients_without_factors_take_bounded_memory(generator, monkeypatch):
    class Scaled(nn.Linear):
        def forward(self, x):
            return F.linear(x, self.weight * 1.0, self.bias)

    monkeypatch.setattr(drawn, "CHUNK_BYTES", 3 * 10_000)
    monkeypatch.setattr(drawn, "HELD_BYTES", 60_000)
    torch.manual_seed(0)
    net = nn.Sequential(Scaled(40, 30), nn.Linear(30, 3))  # 4,920 bytes a gradient
    x, y = torch.randn(64, 40, generator=generator), torch.arange(64) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    counts, observe = [], optimizer._observe

    def counted(number):
        drawn = observe(number)
        counts.append([sum(part.count for part in of.observations) for of in drawn])
        return drawn

    optimizer._observe = counted
    losses = train(net, optimizer, x, y, 10)
    assert counts == [[6, 6]] * 10  # 60,000 / 4,920 = 12.2
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("batch", "first", "last"), [(1, 1, 1), (40, 40, 40), (100, 64, 64), (128, 64, 64), (200, 136, 64), (400, 256, 64)]
)
@pytest.mark.parametrize("at_once", [math.inf, 7])
def test_large_batches_are_learned_from_and_measured_by_other_samples(batch, first, last, at_once, generator):
    net = nn.Linear(4, 3).double()
    optimizer = FishLeg(net, likelihood="gaussian")
    optimizer._drawn._each._most_at_once = at_once  # as where a GPU has no memory for more
    x = torch.randn(batch, 4, generator=generator).double()
    F.mse_loss(net(x), torch.zeros(batch, 3).double()).backward()
    for found, expected in zip(optimizer._observe(1), (x[:first], x[-last:]), strict=True):
        grads = torch.cat([part.gradients["weight"] for part in found.observations])
        assert len(grads) == len(expected)
        ratio = grads / expected[:, None]  # of an outer product, that of each row is one number
        torch.testing.assert_close(ratio, ratio[..., :1].expand_as(ratio))


@pytest.mark.parametrize(
    ("curvature", "length", "parts"), [("fishleg", 1, 1), ("fishleg", 200, 22), ("kronecker", 10, 13)]
)
def test_gradients_come_in_parts_by_what_they_take(curvature, length, parts, generator, monkeypatch):
    """Of T rows 4 (T (o + i) + 2 T^2) bytes in factors, and 4 o i multiplied out."""
    monkeypatch.setattr(drawn, "CHUNK_BYTES", 64 * 4 * (30 + 41 + 2))
    net = nn.Linear(40, 30)
    optimizer = FishLeg(net, likelihood="gaussian", curvature=curvature)
    F.mse_loss(net(torch.randn(64, length, 40, generator=generator)), torch.zeros(64, length, 30)).backward()
    assert len(optimizer._observe(1)[0].observations) == parts


def test_kfac_has_factors_of_layers_for_convolutions(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(288, 3)).double()
    x, y = torch.randn(16, 3, 8, 8, generator=generator).double(), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical", curvature="kronecker")
    train(net, optimizer, x, y, 1)
    rows = F.unfold(x, 3).mT.flatten(0, 1)
    found = optimizer._layers[0].running.col_moment.flatten()
    assert float(F.cosine_similarity(found, (rows.mT @ rows).flatten(), 0)) == pytest.approx(1)
