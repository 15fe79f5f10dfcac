"""What FishLeg learns, against dense float64."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner, prune
from fishleg_ext.curvature import BlockFisher, CurvatureError, DiagonalFisher, FishLeg
from fishleg_ext.observe import Observation, observe
from tests.oracles import batches


@pytest.fixture(scope="module")
def gradients():
    """Per-sample gradients of a small trained network, labels from the model: name -> [512, o, i], float64."""
    torch.manual_seed(0)
    x = torch.randn(512, 8, dtype=torch.float64)
    y = (x[:, :4] @ torch.randn(4, 5, dtype=torch.float64)).argmax(1)
    net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 5)).double()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
    seen = {}

    class Recorder:
        observes = frozenset({"gradients"})

        def update(self, observation):
            for name, g in observation.gradients.items():
                seen.setdefault(name, []).append(g)

    weights = {n: p for n, p in net.named_parameters() if p.dim() > 1}
    observe(net, batches(x, y), F.cross_entropy, Recorder(), weights, num_grads=512, labels="model")
    return {name: torch.cat(g) for name, g in seen.items()}


def learned(gradients, damping, passes=2, batch_size=16, chunk=16, **options):
    """All batches learned, `passes` times."""
    curvature = FishLeg(damping, passes, batch_size, **options)
    curvature.start({name: g[0] for name, g in gradients.items()})
    for _ in range(passes):
        for start in range(0, len(next(iter(gradients.values()))), chunk):
            part = {name: g[start : start + chunk] for name, g in gradients.items()}
            curvature.update(Observation(len(next(iter(part.values()))), gradients=part))
    return curvature


def dense_q(curvature, name):
    return torch.kron(*curvature.factors(name))


def dense_fisher(grads, damping):
    g = grads.flatten(1)
    return g.mT @ g / len(g) + damping * torch.eye(g.shape[1], dtype=g.dtype)


def auxiliary_loss(q, fisher):
    """E_u[1/2 u^T Q F Q u - u^T Q u] over u ~ N(0, I)."""
    return float(0.5 * (q @ fisher @ q).trace() - q.trace())


def test_the_loss_that_is_told_is_the_expectation_over_probes(gradients, generator):
    told = {}
    curvature = learned(gradients, 1e-2)
    before = {name: dense_q(curvature, name) for name in gradients}
    curvature.monitor = lambda name, seen, loss: told.__setitem__(name, (seen, loss))
    last = {name: g[-16:] for name, g in gradients.items()}
    curvature.update(Observation(16, gradients=last))
    for name, grads in last.items():
        fisher = dense_fisher(grads, 1e-2)
        assert told[name][0] == 1040
        assert told[name][1] == pytest.approx(auxiliary_loss(before[name], fisher), rel=1e-9)
        u = torch.randn(40000, len(fisher), dtype=torch.float64, generator=generator)
        v = u @ before[name]
        samples = 0.5 * (v @ fisher * v).sum(1) - (u * v).sum(1)
        assert abs(samples.mean() - told[name][1]) < 4 * samples.std() / 200


def class_optimum(grads, damping):
    """The least auxiliary loss of a Kronecker-factored Q on these gradients: L-BFGS on the roots of its factors."""
    curvature = learned({"w": grads}, damping, passes=20)
    roots = [torch.linalg.cholesky(factor).contiguous().requires_grad_() for factor in curvature.factors("w")]
    optimizer = torch.optim.LBFGS(roots, max_iter=2000, max_eval=4000, history_size=100, line_search_fn="strong_wolfe")
    scale = 1 / abs(auxiliary_loss(dense_q(curvature, "w"), dense_fisher(grads, damping)))

    def loss():
        optimizer.zero_grad()
        row, col = (root @ root.mT for root in roots)
        squares = (row @ grads @ col).square().sum() / len(grads) + damping * row.square().sum() * col.square().sum()
        value = scale * (0.5 * squares - row.trace() * col.trace())
        value.backward()
        return value

    optimizer.step(loss)
    return float(loss()) / scale
