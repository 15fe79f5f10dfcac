"""What pruning with a share of the first-order step is predicted to cost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fishleg_ext import Pruner


@pytest.mark.parametrize("share", [0.25, 1.0])
@pytest.mark.parametrize("curvature", ["block", "fishleg", "kronecker"])
def test_the_prediction_is_the_quadratic_model_of_the_weights_found(curvature, share, generator):
    """g dw + 1/2 dw^T F dw, F the inverse of what `mul` multiplies by."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)).double()
    x = torch.randn(40, 2, 3, dtype=torch.float64, generator=generator)
    y = torch.randint(0, 3, (40,), generator=generator)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    gradient = dict(zip(before, torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())), strict=True))
    options = {"block_size": 1000} if curvature == "block" else {}
    pruner = Pruner(net, curvature=curvature, num_grads=40, first_order=share, progress=False, **options)
    pruner.estimate([(x, y)], F.cross_entropy)
    estimate, oriented = pruner.curvature, pruner.estimator.oriented
    predicted = pruner.prune_to(0.5).predicted_loss_increase
    names = [name for name in before if name in estimate.layouts or name in estimate.biases.values()]
    moves = oriented({name: net.get_parameter(name).detach() - before[name] for name in names})
    slope = oriented({name: gradient[name] for name in names})
    flat = lambda tensors: torch.cat([tensors[name].flatten() for name in names])
    sizes = [moves[name].numel() for name in names]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        v = {name: part.reshape(moves[name].shape) for name, part in zip(names, unit.split(sizes), strict=True)}
        columns.append(flat(estimate.mul(v)))
    inverse = torch.stack(columns)
    fisher = torch.cholesky_inverse(torch.linalg.cholesky((inverse + inverse.mT) / 2))
    move = flat(moves)
    assert predicted == pytest.approx(float(flat(slope) @ move + move @ fisher @ move / 2), rel=1e-6)
