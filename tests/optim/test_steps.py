"""The direction and the length of steps, against what they are said to be."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.optim import FishLeg, fishleg
from optim.problems import CURVATURES, backward, made, train, trained

pytestmark = pytest.mark.filterwarnings("ignore:torch.func.vmap cannot run this model")  # nn.GRU


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
    drawn, observe = [], optimizer._drawn.observe
    optimizer._drawn.observe = lambda *args: drawn.append(observe(*args)) or drawn[-1]
    before = copy.deepcopy(net.state_dict())
    backward(net, x, y)
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    optimizer.step()
    moved = {name: before[name] - p.detach() for name, p in net.named_parameters()}
    along = sum(torch.einsum("s...,...->s", drawn[0][1].observations[0].gradients[name], moved[name]) for name in moved)
    squared = sum(v.square().sum() for v in moved.values())
    slope = sum((grads[name] * moved[name]).sum() for name in moved)
    assert float(slope / (along.square().mean() + 1e-3 * squared)) == pytest.approx(1)


def test_small_gradients_in_half_precision_are_measured_exactly(generator):
    """Products of g and n are below the least positive float16, 6e-8."""
    torch.manual_seed(0)
    net = nn.Linear(40, 30, dtype=torch.float16)
    optimizer = FishLeg(net, likelihood="gaussian", damping=1.0)
    x = torch.randn(64, 40, generator=generator).half()
    F.mse_loss(net(x), net(x).detach() + 1e-3).backward()
    numbers, measure = [], optimizer._length.measure
    optimizer._length.measure = lambda *args: numbers.append(args) or measure(*args)
    optimizer.step()
    n = [optimizer.state[p]["momentum"].double() / 0.2 for p in net.parameters()]  # after one step: 1 - 0.8
    slope = sum(float((p.grad.double() * v).sum()) for p, v in zip(net.parameters(), n, strict=True))
    assert max(float((p.grad * v).abs().median()) for p, v in zip(net.parameters(), n, strict=True)) < 6e-8
    assert numbers[0][0] == pytest.approx(slope, rel=1e-2)
    assert numbers[0][2] == pytest.approx(float(sum(v.square().sum() for v in n)), rel=1e-2)


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
    """What is left is the square of the error of factors and length: few standard errors, 1 / sqrt(samples)."""
    torch.manual_seed(0)
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
    assert F.mse_loss(net(x), y).item() - least < 10**2 / len(x) * (before - least)


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


def test_the_measured_slope_and_curvature_are_running_means(generator, monkeypatch):
    net, optimizer, x, y = trained(generator, momentum=0.0)
    slope, bend = optimizer._length.slope, optimizer._length.bend
    optimizer._steps = 41
    backward(net, x, y)
    for p in net.parameters():
        p.grad.zero_()
    optimizer.step()
    assert optimizer._length.slope == pytest.approx(0.9 * slope)
    assert optimizer._length.bend == pytest.approx(0.9 * bend)


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
