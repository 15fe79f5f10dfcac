"""Slow and plain float64 versions of what the library computes."""

from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.curvature import Curvature, Estimate
from fishleg_ext.observation.types import ProductRows


def cholesky_inverse(matrix: Tensor) -> Tensor:
    return torch.cholesky_inverse(torch.linalg.cholesky(matrix))


def joint_cost(weight: Tensor, inverse: Tensor, pruned: Tensor) -> Tensor:
    """1/2 w_P^T (F^-1[P, P])^-1 w_P of one block, in float64."""
    block = inverse.double()[pruned][:, pruned]
    w = weight.double()[pruned]
    return 0.5 * w @ torch.linalg.solve(block, w) if len(w) else w.sum()


def naive_elimination(weight: Tensor, inverse: Tensor, alive: Tensor) -> tuple[list[int], list[float]]:
    """The formulas of exact greedy pruning, one weight of one block at a time."""
    weight, inverse, alive = weight.double().clone(), inverse.double().clone(), alive.clone()
    order, costs = [], []
    while alive.any():
        candidates = alive.nonzero()[:, 0].tolist()
        cost = {q: float(weight[q] ** 2 / (2 * inverse[q, q])) for q in candidates}
        q = min(candidates, key=lambda i: (cost[i], i))
        column = torch.where(alive, inverse[:, q], 0)
        weight -= column * weight[q] / inverse[q, q]
        inverse -= torch.outer(column, column) / inverse[q, q]
        alive[q] = False
        order.append(q)
        costs.append(cost[q])
    return order, costs


def kronecker_matrix(row: Tensor, col: Tensor, scale: Tensor | None = None) -> Tensor:
    """diag(scale) (row (x) col) diag(scale), dense; a row factor of one dimension is a diagonal."""
    dense = torch.kron(row if row.dim() == 2 else row.diag(), col)
    return dense if scale is None else scale.reshape(-1, 1) * dense * scale.flatten()


def trained(net: nn.Module, inputs: Tensor, targets: Tensor, steps: int = 80, rate: float = 0.01) -> nn.Module:
    """The network after some steps of Adam on all of the data, in eval mode."""
    optimizer = torch.optim.Adam(net.parameters(), rate)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), targets).backward()
        optimizer.step()
    return net.eval()


def batches(inputs: Tensor, targets: Tensor, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def rows_of(x: Tensor, outputs: int) -> ProductRows:
    """What `observe` hands over of one product: rows [n, size], or [groups, n, size]; of all outputs of the weight."""
    return ProductRows(x if x.dim() == 3 else x[None], (0, outputs))


def order_of(rank: Tensor) -> list[int]:
    """Indices of one block in the order in which they were eliminated."""
    reached = (rank >= 0) & (rank < len(rank))
    return torch.where(reached, rank, len(rank)).argsort(stable=True)[: int(reached.sum())].tolist()


def usable(curvature: Any = "block", allocation: Any = None, **settings: Any) -> dict[str, Any]:
    """Those settings that a model by this name can use; an instance has settings of its own."""
    with_blocks, without_damping = {"block", "low_rank", "fishleg"}, {"identity"}
    named = {name for name in (curvature, allocation) if isinstance(name, str)}
    usable = {
        "block_size": bool(named & with_blocks),
        "damping": isinstance(curvature, str) and curvature not in without_damping,
        "labels": bool({curvature, allocation} - {"identity", "layerwise", "layerwise_diagonal", None}),
    }
    return {name: value for name, value in settings.items() if usable.get(name, True)}


def with_estimate(recipe: type[Curvature], estimate: type[Estimate]) -> type[Curvature]:
    """A recipe as `recipe`, whose estimates are of the given class."""

    class Recipe(recipe):
        def start(self, weights, biases=None, **options):
            return estimate(self, weights, biases, **options)

    Recipe.__name__ = recipe.__name__
    return Recipe


def assert_agrees_with_dense(estimate: Estimate, inverse: Tensor, generator: torch.Generator) -> None:
    """Compare all that an estimate in float64 says with the dense inverse of all its weights."""
    layouts = estimate.layouts
    flat = lambda tensors: torch.cat([tensors[name].flatten() for name in layouts])
    random = lambda: {n: torch.randn(x.shape, dtype=torch.float64, generator=generator) for n, x in layouts.items()}
    v, w = random(), random()
    torch.testing.assert_close(flat(estimate.mul(v)), inverse @ flat(v), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flat(estimate.diag()), inverse.diagonal(), rtol=1e-9, atol=1e-9)
    expected = 0.5 * flat(w) @ torch.linalg.solve(inverse, flat(w))
    torch.testing.assert_close(estimate.step_cost(w), float(expected), rtol=1e-8, atol=0)
    torch.testing.assert_close(flat(estimate.fisher_diag()), torch.linalg.inv(inverse).diagonal(), rtol=1e-8, atol=0)
    of_blocks = flat(Estimate.fisher_diag(estimate))
    start = 0
    for name, layout in layouts.items():
        blocks, size = estimate.blocks(name), layout.block_size
        assert blocks.weight_scale is None
        scale = torch.ones(layout.num_blocks, 1) if blocks.cost_scale is None else blocks.cost_scale
        for k in range(layout.num_blocks):
            real = min(size, layout.numel - k * size)
            part = slice(start + k * size, start + k * size + real)
            got = blocks.inverse[min(k, len(blocks.inverse) - 1), :real, :real]
            torch.testing.assert_close(got / scale[k], inverse[part, part], rtol=1e-9, atol=1e-9)
            fisher = torch.linalg.inv(inverse[part, part])
            torch.testing.assert_close(of_blocks[part], fisher.diagonal(), rtol=1e-8, atol=0)
        start += layout.numel
