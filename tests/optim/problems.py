"""Small networks, and how the FishLeg optimizer trains them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext.curvature import Adam
from fishleg_ext.optim import FishLeg

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


def small(generator, outputs=3, samples=64):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, outputs)).double()
    x = torch.randn(samples, 8, generator=generator).double()
    return net, x, x[:, :outputs].argmax(1)


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


def trained(generator, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3)).double()
    x = torch.randn(256, 12, generator=generator).double()
    y = (x[:, :3] + 0.3 * torch.randn(256, 3, generator=generator)).argmax(1)
    optimizer = FishLeg(net, likelihood="categorical", **options)
    train(net, optimizer, x, y, 40)
    return net, optimizer, x, y


def intact(optimizer, net, failing, error, message):
    """Call what fails, and see that nothing has changed but gradients."""
    before = copy.deepcopy((net.state_dict(), optimizer.state_dict()))
    with pytest.raises(error, match=message):
        failing()
    torch.testing.assert_close((net.state_dict(), optimizer.state_dict()), before, rtol=0, atol=0, equal_nan=True)
