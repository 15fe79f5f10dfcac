"""Layerwise pruning of transformers as its authors publish it, in plain PyTorch: what the library is compared with.

Each function prunes a weight [out, in], given the sum H [in, in] of the outer products of its layer's inputs, to a
share of zeros or an n:m pattern, and returns it. `prune_blocks` walks the layers of a model of transformers, each by
the inputs that the layers pruned before give it, as all four papers do.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Target = float | tuple[int, int]  # sparsity, or n of each m
Method = Callable[[Tensor, Tensor, Target], Tensor]
ALPS_STEPS, ALPS_EVERY, CONJUGATE_GRADIENTS = 300, 3, 10


def _lowest(score: Tensor, target: Target, dim_is_row: bool = False) -> Tensor:
    """Bool, True = pruned: the lowest of all, of each row, or of each m in a row."""
    if isinstance(target, tuple):
        n, m = target
        groups = score.unflatten(1, (-1, m))
        order = groups.argsort(dim=2, stable=True)
        pruned = torch.zeros_like(groups, dtype=torch.bool)
        return pruned.scatter_(2, order[..., : m - n], True).flatten(1)
    rows = score if dim_is_row else score.reshape(1, -1)
    order = rows.argsort(dim=1, stable=True)[:, : round(target * rows.shape[1])]
    return torch.zeros_like(rows, dtype=torch.bool).scatter_(1, order, True).reshape(score.shape)


def magnitude(weight: Tensor, h: Tensor, target: Target) -> Tensor:
    """Prune the smallest weights of the layer."""
    return weight.masked_fill(_lowest(weight.abs(), target), 0)


def wanda(weight: Tensor, h: Tensor, target: Target) -> Tensor:
    """Prune the lowest |w| |x| of each row. Sun et al., arXiv 2306.11695."""
    return weight.masked_fill(_lowest(weight.abs() * h.diagonal().sqrt(), target, dim_is_row=True), 0)


def sparsegpt(weight: Tensor, h: Tensor, target: Target, damping: float = 0.01, width: int = 128) -> Tensor:
    """Prune column after column and compensate with those that follow. Frantar and Alistarh, arXiv 2301.00774."""
    w, h = weight.clone(), h + damping * h.diagonal().mean() * torch.eye(len(h))
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for start in range(0, w.shape[1], width):
        stop = min(start + width, w.shape[1])
        diagonal = factor.diagonal()[start:stop]
        errors = torch.zeros_like(w[:, start:stop])
        if not isinstance(target, tuple):
            pruned = _lowest((w[:, start:stop] / diagonal).square(), target)
        for j in range(start, stop):
            if isinstance(target, tuple) and (j - start) % target[1] == 0:
                part = slice(j, j + target[1])
                group = _lowest((w[:, part] / factor.diagonal()[part]).square(), target)
            gone = group[:, (j - start) % target[1]] if isinstance(target, tuple) else pruned[:, j - start]
            error = torch.where(gone, w[:, j] / factor[j, j], 0)
            w[:, j:stop] -= error[:, None] * factor[j, j:stop]
            w[:, j] = torch.where(gone, 0, w[:, j])
            errors[:, j - start] = error
        w[:, stop:] -= errors @ factor[start:stop, stop:]
    return w


def obc(weight: Tensor, h: Tensor, target: Target, damping: float = 1e-4) -> Tensor:
    """Prune greedily in every row, compensating after each weight; then the cheapest of all rows' steps are taken.

    Frantar and Alistarh, arXiv 2208.11580. All rows advance together.
    """
    rows, size = weight.shape
    h = (h / h.diagonal().mean()).double() + damping * torch.eye(size, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    order = torch.full((rows, size), -1)
    cost = torch.full((rows, size), math.inf, dtype=torch.float64)
    group = target[1] if isinstance(target, tuple) else size
    most = size - size // group * target[0] if isinstance(target, tuple) else size
    for part in torch.arange(rows).split(max(1, 2**25 // size**2)):
        w, inv = weight[part].double(), inverse.repeat(len(part), 1, 1)
        alive, here = torch.ones(len(part), size, dtype=torch.bool), torch.arange(len(part))
        open_groups = alive.clone()
        for step in range(most):
            score = (w.square() / inv.diagonal(dim1=1, dim2=2)).masked_fill(~(alive & open_groups), math.inf)
            cheapest, q = score.min(1)
            column = inv[here, :, q]
            pivot = column[here, q]
            w -= column * (w[here, q] / pivot)[:, None]
            inv -= column[:, :, None] * (column / pivot[:, None])[:, None]
            inv.diagonal(dim1=1, dim2=2)[here, q] = 1.0
            alive[here, q] = False
            order[part, step], cost[part, step] = q, cheapest
            if isinstance(target, tuple):
                left = alive.unflatten(1, (-1, group)).sum(2, keepdim=True) > target[0]
                open_groups = left.expand(-1, -1, group).flatten(1)
    if isinstance(target, tuple):
        counts = torch.full((rows,), most)
    else:  # a row's steps are taken in order, each at the price of the dearest so far
        taken = _lowest(cost.cummax(1).values, target)
        counts = taken.sum(1)
    pruned = torch.zeros(rows, size, dtype=torch.bool)
    for r in range(rows):
        pruned[r, order[r, : counts[r]]] = True
    result = weight.double().clone()
    for r in range(rows):  # the best weights for the rows' masks
        p = pruned[r]
        block = torch.linalg.cholesky(inverse[p][:, p])
        result[r] -= inverse[:, p] @ torch.cholesky_solve(result[r, p, None], block)[:, 0]
    return result.masked_fill(pruned, 0).to(weight.dtype)


def alps(weight: Tensor, h: Tensor, target: Target, damping: float = 0.01) -> Tensor:
    """Find the support by ADMM, then the weights on it by conjugate gradients. Meng et al., arXiv 2406.07831.

    Minimises |X W - X W0|^2 + damping * mean diag H * |W - W0|^2 over W with few entries, in coordinates in which H has
    a unit diagonal. rho begins at 0.1, and grows by 1.3, 1.2 or 1.1 every third step, as the support still changes by
    a tenth, by half a percent or by less; ADMM ends when it does not change.
    """
    w0 = weight.T.double()  # [in, out]
    h = h.double() + damping * h.diagonal().mean().double() * torch.eye(len(h), dtype=torch.float64)
    unit = h.diagonal().rsqrt()
    h, w0 = h * unit[:, None] * unit, w0 / unit[:, None]
    values, vectors = torch.linalg.eigh(h)
    g = h @ w0
    rho, dual = 0.1, torch.zeros_like(w0)
    kept_of = lambda x: ~_lowest(x.T.abs(), target).T
    d = torch.where(kept_of(w0), w0, 0)
    support = d != 0
    for step in range(ALPS_STEPS):
        w = vectors @ ((vectors.T @ (g - dual + rho * d)) / (values + rho)[:, None])
        moved = w + dual / rho
        d = torch.where(kept_of(moved), moved, 0)
        dual += rho * (w - d)
        if (step + 1) % ALPS_EVERY == 0:
            changed = int(((d != 0) ^ support).sum())
            support = d != 0
            if changed == 0:
                break
            share = changed / max(1, int(support.sum()))
            rho *= 1.3 if share >= 0.1 else 1.2 if share >= 0.005 else 1.1
    support, w = d != 0, d
    r = torch.where(support, g - h @ w, 0)
    p, rz = r.clone(), r.square().sum(0)
    for _ in range(CONJUGATE_GRADIENTS):  # all columns at once; the diagonal is 1, which preconditions
        hp = torch.where(support, h @ p, 0)
        alpha = rz / (p * hp).sum(0).clamp(min=1e-300)
        w, r = w + alpha * p, r - alpha * hp
        new = r.square().sum(0)
        p, rz = r + new / rz.clamp(min=1e-300) * p, new
    return (w * unit[:, None]).T.to(weight.dtype).contiguous()


RIVALS: dict[str, Method] = {"magnitude": magnitude, "Wanda": wanda, "SparseGPT": sparsegpt, "OBC": obc, "ALPS": alps}


@torch.no_grad()
def prune_blocks(model: nn.Module, layers: nn.ModuleList, batches: list[Any], method: Method, target: Target) -> None:
    """Prune the linear layers of every block in place.

    Args:
        model: of transformers, whose layers take hidden states first and return them.
        layers: its blocks.
        batches: keywords of the model.
        method: see above.
        target: sparsity of every layer, or (n, m).
    """
    calls = _first_calls(model, layers[0], batches)
    masks = [batch.get("attention_mask") for batch in batches]
    for layer in layers:
        linears = {name: m for name, m in layer.named_modules() if isinstance(m, nn.Linear)}
        sums = {name: Products(m) for name, m in linears.items()}
        for (hidden, args, kwargs), mask in zip(calls, masks, strict=True):
            for products in sums.values():
                products.tokens = None if mask is None else mask.bool()
            layer(hidden, *args, **kwargs)
        for name, m in linears.items():
            sums[name].handle.remove()
            if not isinstance(target, tuple) or m.in_features % target[1] == 0:  # others stay dense
                m.weight.copy_(method(m.weight, sums[name].total, target))
        calls = [(layer(hidden, *args, **kwargs), args, kwargs) for hidden, args, kwargs in calls]


class Products:
    """The sum of the outer products of a layer's inputs, padding left out."""

    def __init__(self, layer: nn.Linear) -> None:
        self.total = torch.zeros(layer.in_features, layer.in_features)
        self.tokens: Tensor | None = None
        self.handle = layer.register_forward_pre_hook(self.add)

    def add(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Add those of a batch."""
        x = args[0] if self.tokens is None else args[0][self.tokens]
        x = x.reshape(-1, x.shape[-1])
        self.total += x.T @ x


class _Caught(Exception):
    pass


def _first_calls(model: nn.Module, first: nn.Module, batches: list[Any]) -> list[tuple[Tensor, Any, dict[str, Any]]]:
    """Hidden states and other arguments that the first layer is called with."""
    calls: list[tuple[Tensor, Any, dict[str, Any]]] = []

    def caught(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.pop("hidden_states")
        calls.append((hidden, args[1:], kwargs))
        raise _Caught

    handle = first.register_forward_pre_hook(caught, with_kwargs=True)
    for batch in batches:
        with contextlib.suppress(_Caught):
            model(**batch, use_cache=False)
    handle.remove()
    return calls
