"""The FishLeg optimizer on small networks, against what it says it does."""

import copy
import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import Adam, CurvatureError
from fishleg_ext.optim import FishLeg, drawn, fishleg

pytestmark = pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")  # nn.GRU
CURVATURES = ["fishleg", "kronecker", "adam"]


def made(curvature="fishleg", **options):
    if curvature == "adam":
        return {"adam": Adam(steps=None, scaled=False)} | options
    return {"curvature": curvature} | options


class Tied(nn.Module):
    """A weight that enters twice, a lookup, a norm and a parameter that is no matrix."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(11, 6), nn.LayerNorm(6)
        self.hidden, self.scale = nn.Linear(6, 6), nn.Parameter(torch.ones(6))

    def forward(self, tokens):
        x = self.norm(self.embedding(tokens))
        x = self.hidden(torch.tanh(self.hidden(x))) * self.scale
        return x @ self.embedding.weight.mT


NETS = {
    "linear": lambda: (nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)), (7,)),
    "without bias": lambda: (nn.Sequential(nn.Linear(7, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)), (7,)),
    "convolutions": lambda: (
        nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
        (2, 4, 4),
    ),
    "transposed": lambda: (
        nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)),
        (2, 4),
    ),
    "recurrent": lambda: (Last(nn.GRU(4, 3, batch_first=True)), (5, 4)),
}


class Last(nn.Module):
    def __init__(self, recurrent):
        super().__init__()
        self.recurrent = recurrent

    def forward(self, x):
        return self.recurrent(x)[0][:, -1]


@pytest.fixture(params=NETS)
def problem(request, generator):
    torch.manual_seed(0)
    net, shape = NETS[request.param]()
    x = torch.randn(32, *shape, generator=generator).double()
    return net.double(), x, (x.flatten(1) @ torch.randn(x[0].numel(), 3, generator=generator).double()).argmax(1)


def backward(net, x, y):
    net.zero_grad()
    loss = F.cross_entropy(net(x), y)
    loss.backward()
    return loss.item()


def train(net, optimizer, x, y, steps):
    losses = []
    for _ in range(steps):
        losses.append(backward(net, x, y))
        optimizer.step()
    return [*losses, F.cross_entropy(net(x), y).item()]


@pytest.mark.parametrize("curvature", CURVATURES)
def test_losses_fall(problem, curvature):
    net, x, y = problem
    losses = train(net, FishLeg(net, likelihood="categorical", **made(curvature)), x, y, 30)
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("damping", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("curvature", ["fishleg", "kronecker"])
def test_losses_fall_with_every_damping(damping, curvature, generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(7, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 3)).double()
    x, y = torch.randn(48, 7, generator=generator).double(), torch.arange(48) % 3
    losses = train(net, FishLeg(net, 1.0, likelihood="categorical", damping=damping, curvature=curvature), x, y, 20)
    assert losses[-1] < 0.9 * losses[0]
    if damping >= 1e-4:  # else the first step, of which the inverse knows 48 samples, is outside the quadratic model
        assert losses == sorted(losses, reverse=True)


def test_a_step_goes_along_the_product_of_inverse_and_gradient(problem):
    net, x, y = problem
    optimizer = FishLeg(net, likelihood="categorical", momentum=0.0)
    train(net, optimizer, x, y, 2)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    backward(net, x, y)
    optimizer.step()
    lengths = []
    for layer in optimizer._layers:
        row, col = layer.running.row, layer.running.col
        moved = layer.matrix({name: before[name] - p.detach() for name, p in layer.parameters.items()})
        gradient = layer.matrix({name: p.grad for name, p in layer.parameters.items()})
        direction = row @ gradient @ col
        lengths.append(float((moved * direction).sum() / direction.square().sum()))
        torch.testing.assert_close(moved, lengths[-1] * direction)
    for other in optimizer._others:
        moved = before[other.name] - other.parameter.detach()
        lengths.append(float(moved.sum() / (other.parameter.grad / (other.squares + optimizer.damping)).sum()))
    assert min(lengths) > 0
    assert lengths == pytest.approx([lengths[0]] * len(lengths))


def test_the_step_is_where_the_drawn_gradients_have_their_minimum(generator):
    """c = g^T n / n^T (F + damping I) n, F of drawn gradients that are computed here one by one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(24, 4, generator=generator).double(), torch.arange(24) % 3
    optimizer = FishLeg(net, 1.0, likelihood="categorical", momentum=0.0, max_divergence=1e9, damping=1e-3)
    drawn = []
    observe = optimizer._drawn.observe
    optimizer._drawn.observe = lambda *args, **options: drawn.append(observe(*args, **options)) or drawn[-1]
    before = copy.deepcopy(net.state_dict())
    backward(net, x, y)
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    moved = {name: before[name] - p.detach() for name, p in net.named_parameters()}
    along = sum(torch.einsum("s...,...->s", drawn[1].observations[0].gradients[name], moved[name]) for name in moved)
    squared = sum(v.square().sum() for v in moved.values())
    slope = sum((grads[name] * moved[name]).sum() for name in moved)
    assert float(slope / (along.square().mean() + 1e-3 * squared)) == pytest.approx(1)


def test_no_step_is_longer_than_the_divergence_allows(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(64, 4, generator=generator).double(), torch.arange(64) % 3
    optimizer = FishLeg(net, likelihood="categorical", max_divergence=1e-4)
    for _ in range(5):
        before = net(x).detach().log_softmax(1)
        train(net, optimizer, x, y, 1)
        divergence = (before.exp() * (before - net(x).detach().log_softmax(1))).sum(1).mean()
        assert float(divergence) == pytest.approx(1e-4, rel=0.6)  # of 64 labels, drawn


def test_one_step_on_a_quadratic_lands_in_its_minimum(generator, monkeypatch):
    """What is left is the error of the factors and of the length, from labels drawn: its square, by 1 / samples."""
    monkeypatch.setattr(fishleg, "MEASURED", 20_000)
    x = torch.randn(20_000, 4, generator=generator).double() @ torch.diag(torch.tensor([0.3, 1.0, 2.0, 5.0])).double()
    y = x @ torch.randn(4, 3, generator=generator).double() + 1 + torch.randn(20_000, 3, generator=generator).double()
    net = nn.Linear(4, 3).double()
    ones = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    least = F.mse_loss(ones @ torch.linalg.lstsq(ones, y).solution, y).item()
    before = F.mse_loss(net(x), y).item()
    optimizer = FishLeg(
        net, 1.0, likelihood="gaussian", damping=1e-12, momentum=0.0, samples=len(x), max_divergence=1e9
    )
    F.mse_loss(net(x), y).backward()
    optimizer.step()
    assert F.mse_loss(net(x), y).item() - least < 1e-3 * (before - least)


def test_the_direction_is_nearer_to_the_exact_natural_gradient(generator):
    """A deep linear network, 20 layers of 20 with 40 samples; F exactly, of all 8,000 weights, in float64."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(20, 20, bias=False) for _ in range(20))).double()
    for layer in net:
        nn.init.orthogonal_(layer.weight)
        layer.weight.data += 0.05 * torch.randn(20, 20, generator=generator)
    x = torch.randn(40, 20, generator=generator).double()
    y = x @ torch.randn(20, 20, generator=generator).double() / 20**0.5
    damping = 1e-2
    optimizer = FishLeg(net, 1.0, likelihood="gaussian", damping=damping, samples=40, momentum=0.9)
    seen = []
    for step in range(101):
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        if step in (30, 100):
            g = torch.cat([layer.weight.grad.flatten() for layer in net])
            jacobian = torch.autograd.functional.jacobian(
                lambda *weights: torch.linalg.multi_dot([*reversed(weights), x.mT]).flatten(),
                tuple(layer.weight.detach() for layer in net),
            )
            root = torch.cat([part.flatten(1) for part in jacobian], 1) * (2 / y.numel()) ** 0.5  # F = root^T root
            inner = root @ root.mT + damping * torch.eye(len(root)).double()
            exact = (
                g - root.mT @ torch.cholesky_solve((root @ g)[:, None], torch.linalg.cholesky(inner))[:, 0]
            ) / damping
            products = [
                layer.running.row @ net[i].weight.grad @ layer.running.col for i, layer in enumerate(optimizer._layers)
            ]
            ours = torch.cat([product.flatten() for product in products])
            seen.append([float(F.cosine_similarity(v, exact, 0)) for v in (ours, g)])
        optimizer.step()
    for ours, of_gradient in seen:
        assert ours > 1.5 * of_gradient
    assert loss.item() < 0.02


# The user's own passes.


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
            backward(net, x[:2], y[:2])
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
    torch.testing.assert_close(seen[-1], expected.detach(), rtol=0, atol=3e-3 if training else 1e-9)  # n - 1


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
    draw = optimizer._drawn._sampler.draw
    optimizer._make_drawn, make = (lambda: watched(make())), optimizer._make_drawn

    def watched(drawn):
        sampler = drawn._sampler
        sampler.draw = lambda g, outputs, *args: seen.append(outputs) or draw(g, outputs, *args)
        return drawn

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
    counts, learn = [], optimizer._learn
    optimizer._learn = lambda seen: counts.append(sum(part.count for part in seen.observations)) or learn(seen)
    losses = train(net, optimizer, x, y, 10)
    assert 60_000 / 4_920 <= min(counts) <= max(counts) < 60_000 / 4_920 + 10
    assert losses[-1] < losses[0]


def test_kfac_has_factors_of_layers_for_convolutions(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Flatten(), nn.Linear(288, 3)).double()
    x, y = torch.randn(16, 3, 8, 8, generator=generator).double(), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical", curvature="kronecker")
    train(net, optimizer, x, y, 1)
    rows = F.unfold(x, 3).mT.flatten(0, 1)
    found = optimizer._layers[0].running.col_moment.flatten()
    assert float(F.cosine_similarity(found, (rows.mT @ rows).flatten(), 0)) == pytest.approx(1)


# What other optimizers can.


def test_groups_have_options_of_their_own(generator):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    groups = [{"params": net[0].parameters(), "lr": 0.0}, {"params": [net[2].weight], "weight_decay": 0.5}]
    optimizer = FishLeg(net, 0.1, likelihood="categorical", params=groups)
    before = copy.deepcopy(net.state_dict())
    twin = copy.deepcopy(net)
    train(net, optimizer, x, y, 1)
    for name in ("0.weight", "0.bias", "2.bias"):
        assert torch.equal(net.state_dict()[name], before[name])
    plain = [{"params": twin[0].parameters(), "lr": 0.0}, {"params": [twin[2].weight]}]
    train(twin, FishLeg(twin, 0.1, likelihood="categorical", params=plain), x, y, 1)
    torch.testing.assert_close(net[2].weight, twin[2].weight - 0.1 * 0.5 * before["2.weight"])


def test_schedulers_change_the_step(generator):
    torch.manual_seed(0)
    net = nn.Linear(4, 3)
    x, y = torch.randn(8, 4, generator=generator), torch.arange(8) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.0 if epoch else 1.0)
    train(net, optimizer, x, y, 1)
    scheduler.step()
    before = net.weight.detach().clone()
    train(net, optimizer, x, y, 1)
    assert torch.equal(net.weight, before)


def test_scaled_losses_are_unscaled_first(generator):
    nets = []
    for scaled in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(4, 3)
        x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
        optimizer, scaler = FishLeg(net, likelihood="categorical"), torch.amp.GradScaler("cpu", enabled=scaled)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(net(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        nets.append(net)
    torch.testing.assert_close(nets[0].weight, nets[1].weight)


@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_run_that_was_killed_goes_on_to_the_bit(curvature, problem, tmp_path):
    net, x, y = problem
    options = made(curvature, warm_up=3, update_every=2, invert_every=4)
    optimizer = FishLeg(net, likelihood="categorical", **options)
    train(net, optimizer, x, y, 5)
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    other = copy.deepcopy(net)
    train(net, optimizer, x, y, 6)
    for p in other.parameters():
        p.data.zero_()
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other.load_state_dict(saved["net"])
    resumed = FishLeg(other, likelihood="categorical", **options)
    resumed.load_state_dict(saved["optimizer"])
    train(other, resumed, x, y, 6)
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_copies_of_the_model_keep_nothing(problem):
    net, x, y = problem
    optimizer = FishLeg(net, likelihood="categorical")
    train(net, optimizer, x, y, 1)
    copied = copy.deepcopy(net)
    copied(x)
    before = optimizer._forward.called
    copied(x + 1)
    assert optimizer._forward.called is before


# Pruning with what it has learned.


def trained(generator, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(256, 12, generator=generator).double()
    y = (x[:, :3] + 0.3 * torch.randn(256, 3, generator=generator)).argmax(1)
    optimizer = FishLeg(net, likelihood="categorical", **options)
    train(net, optimizer, x, y, 40)
    return net, optimizer, x, y


def test_it_prunes_without_data(generator):
    net, optimizer, x, y = trained(generator)
    blind = copy.deepcopy(net)
    prune(blind, None, sparsity=0.7, curvature="identity", progress=False)
    # What is given anyway is not read, nor asked for a likelihood.
    with_data = copy.deepcopy(net)
    prune(with_data, [(x, y)], F.mse_loss, sparsity=0.7, curvature=optimizer.curvature, progress=False)
    result = prune(net, None, sparsity=0.7, curvature=optimizer.curvature, progress=False)
    assert torch.equal(with_data[0].weight, net[0].weight)
    assert result.sparsity == pytest.approx(0.7, abs=0.01)
    loss = lambda model: F.cross_entropy(model(x), y).item()
    assert loss(net) < loss(blind)


def test_its_curvature_is_that_of_its_factors(generator):
    net, optimizer, *_ = trained(generator)
    pruner = Pruner(net, curvature=optimizer.curvature, progress=False)
    pruner.estimate()
    for layer in optimizer._layers:
        row, col, _ = pruner.curvature.factors(layer.name)
        root = 1e-8**0.5
        torch.testing.assert_close(row, 1 / (layer.running.row_moment.diagonal() + root))
        expected = torch.linalg.inv(layer.running.col_moment + root * torch.eye(len(col)).double())
        torch.testing.assert_close(col, expected)


def test_pruned_weights_stay_zero_while_it_goes_on(generator):
    net, optimizer, x, y = trained(generator)
    pruner = Pruner(net, curvature=optimizer.curvature, progress=False)
    pruner.attach(optimizer)
    for sparsity in (0.5, 0.8):
        pruner.estimate()
        pruner.prune_to(sparsity)
        before = F.cross_entropy(net(x), y).item()
        train(net, optimizer, x, y, 10)
        assert F.cross_entropy(net(x), y).item() < before
        for name, mask in pruner.masks.items():
            weight = net.get_parameter(name)
            assert (weight[~mask] == 0).all()
            assert (optimizer.state[weight]["momentum"][~mask] == 0).all()
    assert pruner.finalize().sparsity == pytest.approx(0.8, abs=0.01)


def test_masks_are_followed_until_they_are_not(generator):
    """Within masks the step is what Q makes of the masked gradient, masked."""
    net, optimizer, x, y = trained(generator, momentum=0.0)
    mask = torch.rand(16, 12, generator=generator) < 0.5
    handle = optimizer.follow_masks(lambda: [(net[0].weight, mask)])
    for follows in (True, False):
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        backward(net, x, y)
        optimizer.step()
        layer = optimizer._layers[0]
        moved = layer.matrix({name: before[name] - net.get_parameter(name).detach() for name in ("0.weight", "0.bias")})
        kept = torch.cat([mask if follows else torch.ones_like(mask), torch.ones(16, 1, dtype=torch.bool)], 1)
        gradient = layer.matrix({name: net.get_parameter(name).grad for name in ("0.weight", "0.bias")}) * kept
        direction = layer.running.row @ gradient @ layer.running.col * kept
        torch.testing.assert_close(moved, float((moved * direction).sum() / direction.square().sum()) * direction)
        handle.remove()


def test_larger_gradients_are_looked_at_at_once(generator):
    net, optimizer, x, y = trained(generator, warm_up=1, update_every=100, invert_every=100)
    seen = optimizer._layers[0].running.batches
    train(net, optimizer, x, y, 1)
    assert optimizer._layers[0].running.batches == seen
    with torch.no_grad():
        net[2].weight *= -1
    train(net, optimizer, x, y, 1)
    assert optimizer._layers[0].running.batches == seen + 1


@pytest.mark.gpu
@pytest.mark.parametrize("curvature", CURVATURES)
def test_steps_on_a_gpu_are_those_on_the_host(curvature, generator):
    losses = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double().to(device)
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(0)).double().to(device)
        losses.append(train(net, FishLeg(net, likelihood="categorical", **made(curvature)), x, x[:, :3].argmax(1), 10))
    assert losses[0][0] == pytest.approx(losses[1][0])
    assert losses[1][-1] < 0.7 * losses[1][0]  # of other labels than on the host


def test_masks_belong_to_parameters_and_go_with_their_handle(generator):
    """A pruner of a part of the model has other names for its parameters."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)), nn.Linear(8, 3))
    x, y = torch.randn(16, 8, generator=generator), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical")
    pruner = Pruner(net[1], curvature="identity", progress=False)
    handle = pruner.attach(optimizer)
    pruner.estimate()
    pruner.prune_to(0.5)
    before = net[0].weight.detach().clone()
    train(net, optimizer, x, y, 2)
    assert (net[0].weight != before).all()
    assert (net[1][0].weight == 0).sum() == 32
    handle.remove()
    train(net, optimizer, x, y, 1)
    assert (net[1][0].weight == 0).sum() == 0


def test_a_lookup_that_is_pruned_has_a_diagonal(generator):
    torch.manual_seed(0)
    net, tokens = Tied(), torch.randint(11, (6, 5), generator=generator)
    optimizer = FishLeg(net, likelihood="tokens")
    F.cross_entropy(net(tokens).movedim(-1, 1), tokens).backward()
    optimizer.step()
    pruner = Pruner(net, curvature=optimizer.curvature, params=["embedding.weight"], progress=False)
    pruner.estimate()
    squares = next(other for other in optimizer._others if other.name == "embedding.weight").squares
    torch.testing.assert_close(pruner.curvature.diag()["embedding.weight"], 1 / (squares + 1e-8))
    copy.deepcopy(pruner).estimate()


def test_columns_follow_the_order_of_a_pattern(generator):
    """n:m patterns see convolutions with their channels last."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = torch.randn(16, 4, 4, 4, generator=generator).double(), torch.arange(16) % 3
    optimizer = FishLeg(net, likelihood="categorical", params=[net[0].weight, net[2].weight])
    train(net, optimizer, x, y, 3)
    factors = {}
    for pattern in ("unstructured", "2:4"):
        pruner = Pruner(net, curvature=optimizer.curvature, pattern=pattern, params=["0.weight"], progress=False)
        with pytest.raises(ValueError, match=r"does not have 0\.bias, which would be compensated with 0\.weight"):
            pruner.estimate()
    net[0].bias = None
    for pattern in ("unstructured", "2:4"):
        pruner = Pruner(net, curvature=optimizer.curvature, pattern=pattern, params=["0.weight"], progress=False)
        pruner.estimate()
        factors[pattern] = pruner.curvature.factors("0.weight").col
    order = torch.arange(36).reshape(4, 3, 3).permute(1, 2, 0).flatten()
    torch.testing.assert_close(factors["2:4"], factors["unstructured"][order][:, order])


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected likelihood=, which labels for the curvature are drawn from: 'categorical'"),
        ({"likelihood": "poisson"}, "expected likelihood to be one of categorical"),
        ({"likelihood": lambda outputs, generator: outputs}, "expected loss_fn=, the loss that is minimised"),
        ({"likelihood": "gaussian", "lr": -1}, "expected lr to be finite and >= 0, got -1"),
        ({"likelihood": "gaussian", "damping": 0}, "expected damping to be finite and > 0, got 0"),
        ({"likelihood": "gaussian", "momentum": 1}, r"expected momentum in \[0, 1\), got 1"),
        ({"likelihood": "gaussian", "curvature": "block"}, "expected curvature to be 'fishleg' or 'kronecker'"),
        (
            {"likelihood": "gaussian", "invert_every": 3},
            "expected invert_every to be a multiple of update_every=2, got 3",
        ),
        ({"likelihood": "gaussian", "adam": Adam()}, r"expected adam=Adam\(steps=None, scaled=False"),
        (
            {"likelihood": "gaussian", "params": [nn.Parameter(torch.ones(2))]},
            "expected parameters of the model, got 1",
        ),
        ({"likelihood": "gaussian", "params": []}, "empty parameter list"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FishLeg(nn.Linear(2, 2), **options)


def intact(optimizer, net, failing, error, message):
    """Call what fails, and see that nothing has changed but gradients."""
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        failing()
    torch.testing.assert_close((net.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0, equal_nan=True)


def test_what_is_not_finite_changes_nothing(generator):
    net, optimizer, x, y = trained(generator)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(net(x), y) * torch.nan
        loss.backward()
        return loss

    intact(
        optimizer, net, lambda: optimizer.step(closure), ValueError, "expected closure to return a finite loss, got nan"
    )
    backward(net, x, y)
    net[2].weight.grad[0, 0] = torch.inf
    intact(optimizer, net, optimizer.step, ValueError, r"the gradients of 2\.weight contain NaN or inf")
    backward(net, x, y)
    assert math.isfinite(optimizer.step(lambda: backward(net, x, y)))


@pytest.mark.parametrize("call", [1, 2])
def test_a_likelihood_that_fails_changes_nothing(call, generator):
    net, optimizer, x, y = trained(generator, warm_up=100)
    backward(net, x, y)
    calls, draw = [], optimizer._drawn._sampler.draw

    def failing(*args):
        calls.append(None)
        if len(calls) == call:
            raise ValueError("the likelihood fails")
        return draw(*args)

    optimizer._drawn._sampler.draw = failing
    intact(optimizer, net, optimizer.step, ValueError, "the likelihood fails")


def test_moments_that_cannot_be_inverted_change_nothing(generator, monkeypatch):
    net, optimizer, x, y = trained(generator, warm_up=100)
    backward(net, x, y)

    monkeypatch.setattr(optimizer._layers[1].running, "invert", lambda damping: torch.ones(()))
    intact(optimizer, net, optimizer.step, CurvatureError, r"the factors of 2\.weight have no inverse")


def test_options_of_groups_and_copies(generator):
    net, optimizer, x, y = trained(generator)
    with pytest.raises(ValueError, match=r"expected momentum in \[0, 1\), got 1"):
        FishLeg(net, likelihood="categorical", params=[{"params": net[0].parameters(), "momentum": 1.0}])
    optimizer.param_groups[0]["lr"] = math.nan
    backward(net, x, y)
    intact(optimizer, net, optimizer.step, ValueError, "expected learning rates to be finite and >= 0, got nan")
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.deepcopy(optimizer)
    net.float()
    backward(net, x.float(), y)
    with pytest.raises(RuntimeError, match=r"0\.weight was replaced in the model, moved, or changed"):
        optimizer.step()


def test_the_measured_slope_and_curvature_are_running_means(generator, monkeypatch):
    net, optimizer, x, y = trained(generator, momentum=0.0)
    slope, bend = optimizer._slope, optimizer._bend
    optimizer._steps = 41
    backward(net, x, y)
    for p in net.parameters():
        p.grad.zero_()
    optimizer.step()
    assert optimizer._slope == pytest.approx(0.9 * slope)
    assert optimizer._bend == pytest.approx(0.9 * bend)


def test_models_that_were_not_called_changed_or_replaced(generator):
    net, optimizer, x, y = trained(generator)
    fresh = nn.Linear(4, 3)
    other = FishLeg(fresh, likelihood="categorical")
    for p in fresh.parameters():
        p.grad = torch.ones_like(p)
    intact(other, fresh, other.step, RuntimeError, "the model was not called with gradients enabled")
    backward(net, x, y)
    weight = net[2].weight
    net[2].weight = nn.Parameter(weight.detach().clone())
    with pytest.raises(RuntimeError, match=r"2\.weight was replaced in the model, moved, or changed its shape"):
        optimizer.step()
    net[2].weight = weight
    with pytest.raises(NotImplementedError, match="takes no parameters later on"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_states_of_others_are_refused(generator):
    net, optimizer, *_ = trained(generator)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    intact(
        optimizer, net, lambda: optimizer.load_state_dict(sgd.state_dict()), ValueError, "expected the state of FishLeg"
    )
    wide = nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))
    state = FishLeg(wide, likelihood="categorical").state_dict()
    message = r"expected row_moment|expected col_moment of 0\.weight of shape \[13, 13\], got \[14, 14\]"
    intact(optimizer, net, lambda: optimizer.load_state_dict(state), ValueError, message)


def test_curvature_before_the_first_step_and_of_other_models(generator):
    net, optimizer, *_ = trained(generator)
    fresh = FishLeg(net, likelihood="categorical")
    with pytest.raises(ValueError, match="has taken no step"):
        prune(net, None, sparsity=0.5, curvature=fresh.curvature, progress=False)
    other = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    with pytest.raises(ValueError, match=r"0\.weight is not the weight that the optimizer has"):
        prune(other, None, sparsity=0.5, curvature=optimizer.curvature, progress=False)
