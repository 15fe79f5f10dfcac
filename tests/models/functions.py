"""Small models that call their layers in ways of their own, and how they are pruned and compared."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fishleg_ext
from fishleg_ext.curvature import MODELS

OF_INPUTS = ["layerwise", "layerwise_diagonal", "kronecker"]
OF_GRADIENTS = [name for name in MODELS if name not in OF_INPUTS]


class Net(nn.Module):
    def __init__(self, between=torch.tanh):
        super().__init__()
        torch.manual_seed(7)
        self.a, self.b, self.between = nn.Linear(8, 8), nn.Linear(8, 3), between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def prune(model, data, loss_fn=F.cross_entropy, **options):
    data = data if isinstance(data, list) else [data]
    return fishleg_ext.prune(model, data, loss_fn, **{"sparsity": 0.5, "num_grads": 24, "progress": False} | options)


def assert_alike(first, second):
    """Two results, of the same function with parameters of other names."""
    for a, b in zip(first.masks.values(), second.masks.values(), strict=True):
        assert torch.equal(a, b)
    assert first.predicted_loss_increase == pytest.approx(second.predicted_loss_increase, rel=1e-6)


class Tokens(nn.Module):
    """One function of [N, T, 8], three ways to call its layer."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(1)
        self.a, self.h, self.how = nn.Linear(8, 8), nn.Linear(8, 3), how

    def forward(self, x):
        if self.how == "flat":
            z = self.a(x.reshape(-1, 8)).reshape(x.shape)
        elif self.how == "positions first":
            z = self.a(x.transpose(0, 1)).transpose(0, 1)
        elif self.how == "one by one":
            z = torch.stack([self.a(input=x[:, t]) for t in range(x.shape[1])], dim=1)
        elif self.how == "einsum":
            z = torch.einsum("nti,oi->nto", x, self.a.weight) + self.a.bias
        else:
            z = self.a(x)
        return self.h(torch.tanh(z).mean(1))


class Experts(nn.Module):
    """A token goes through one of three experts; of those that get none, some are called with nothing."""

    def __init__(self, how, used=2):
        super().__init__()
        torch.manual_seed(4)
        self.experts, self.how, self.used = nn.Parameter(torch.randn(3, 8, 8) * 0.5), how, used
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        choice = (x[..., 0] > 0.8).long() if self.used == 2 else (x[..., 0] * 100).long() % 3
        if self.how == "masked":  # every expert sees all tokens
            each = torch.einsum("nti,eoi->ento", x, self.experts)
            y = sum(each[e] * (choice == e)[..., None] for e in range(3))
        else:
            y = torch.zeros_like(x)
            for e in range(3):
                if self.how == "all" or bool((choice == e).any()):
                    y = y.index_put((choice == e).nonzero(as_tuple=True), x[choice == e] @ self.experts[e].t())
        return self.head(torch.tanh(y).mean(1))


class SharedRows(nn.Module):
    """Queries that are projected once for the whole batch, as some detection models do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.query, self.project, self.head = nn.Parameter(torch.randn(2, 8)), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head((torch.tanh(x) @ self.project(self.query).t()).softmax(1) @ self.query)
