"""Sees what goes into the user's own forward pass, and what comes back: inputs, and factors of gradients.

The gradient of a weight is G = D^T X, X the inputs of its products in the forward pass and D the gradients by their
outputs. P G M = (P D^T) (X M) takes n (o^2 + i^2 + o i) operations for n rows, and o i (o + i) for G itself: of a small
batch, fewer; of what was accumulated over many, more.
"""

import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode, _pop_mode, _push_mode
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from fishleg_ext.common.waiting import read
from fishleg_ext.observation.forward import is_running
from fishleg_ext.observation.products import Product
from fishleg_ext.observation.recorder import ProductRecorder
from fishleg_ext.optim.layers import Layer

Called = tuple[tuple[Any, ...], dict[str, Any]]
# By how much two sums of the same products may differ, in units of rounding of the sum of their norms.
ROUNDING = 16.0
# Passes whose products are kept for a step that may come.
MOST_PASSES = 64


@dataclass(eq=False)
class SeenProduct:
    """One product of a weight in the user's forward pass, and the gradient by its output once it is there."""

    product: Product
    gradient: Tensor | None = None


class ForwardHooks:
    """Hooks of a model that keep the inputs of its last forward pass, and the products of some of its weights.

    Only passes with gradients enabled count, and not those that the library makes itself. The hooks end with this
    object; a copy of the model has none that keep anything.

    Args:
        model: any module.
        layers: whose products are seen.

    Attributes:
        called: positional and keyword arguments of the last pass; in the dtype of weights, if autocast made them half.
        overwritten: whether that pass wrote into them.
        samples: how many there were in all passes since the last step.
    """

    def __init__(self, model: nn.Module, layers: list[Layer]) -> None:
        self.called: Called | None = None
        self.overwritten, self.samples, self._taken = False, 0, False
        self._versions: list[tuple[Tensor, int]] = []  # of the arguments, before the pass
        self._layers = {layer.name: layer for layer in layers}
        self._seen: list[SeenProduct] = []
        self._passes = 0  # since `factors` was called
        self._rows: dict[str, float] = {}  # of each weight, of all products that are kept
        self._left_out: set[str] = set()  # weights whose products are more work than the gradient
        self._recorders: list[ProductRecorder] = []
        self._directions: dict[tuple[int, torch.dtype, torch.device], Tensor] = {}
        before, after = _Weakly(self, "before"), _Weakly(self, "after")
        before.handle = model.register_forward_pre_hook(before, with_kwargs=True)
        after.handle = model.register_forward_hook(after, always_call=True)

    def before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begin to see a pass."""
        if is_running() or not torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return
        if self._recorders:
            self._leave(_active_calls(model) - 1)
        held = next(model.parameters()).dtype
        given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and not x.is_inference()]
        self._versions, self.overwritten = [(x, x._version) for x in given], False
        self.called = pytree.tree_map(lambda x: _kept(x, held), (args, kwargs))
        self.samples = 0 if self._taken else self.samples
        self._taken = False
        self.samples += next((len(x) for x in given if x.dim()), 1)
        self._passes += 1
        # Of what nobody asks for not everything is kept: the optimizer may not be in use.
        self._seen = [seen for seen in self._seen if seen.gradient is not None and self._passes <= MOST_PASSES]
        self._rows = {}
        for seen in self._seen:
            self._count(seen.product)
        weights = {name: layer.parameters[name] for name, layer in self._layers.items()}
        orientations = {name: layer.orientation for name, layer in self._layers.items()}
        recorder = ProductRecorder(weights, orientations, self._take)
        recorder.__enter__()
        self._recorders.append(recorder)

    def after(self, *_: Any) -> None:
        """End it."""
        if self._recorders and not is_running():
            self._recorders.pop().__exit__(None, None, None)
            self.overwritten |= any(x._version != version for x, version in self._versions)
            self._versions = []  # of a pass within another, that of the inner one counts, which is `called`

    def _leave(self, active: int) -> None:
        """Leave passes that were interrupted, without hooks after them, but for the first `active`, which go on."""
        while len(self._recorders) > active:
            stale, above = self._recorders.pop(), []
            while _get_current_function_mode() is not None and (mode := _pop_mode()) is not stale:
                above.append(mode)
            for mode in reversed(above):
                _push_mode(mode)

    def _count(self, product: Product) -> float:
        """Count its rows, and return how many those of the weight are."""
        rows = product.inputs.numel() / max(1, self._layers[product.name].orientation.fan_in)
        self._rows[product.name] = self._rows.get(product.name, 0.0) + rows
        return self._rows[product.name]

    def _take(self, product: Product) -> None:
        """Keep a product that is less work than the gradient, until its output's gradient is there."""
        layer = self._layers[product.name]
        if product.name in self._left_out or layer.running.row.dtype != product.inputs.dtype:
            return  # the latter are rounded otherwise than the gradient may be
        rows, cols = len(layer.running.row), len(layer.running.col)
        n = self._count(product)
        whole = product.groups == 1 and product.outputs == (0, rows) and product.edge is not None
        if not whole or n * (rows**2 + cols**2 + rows * cols) >= rows * cols * (rows + cols):
            self._left_out.add(product.name)
            self._seen = [seen for seen in self._seen if seen.product.name != product.name]
            return
        seen = SeenProduct(product)
        self._seen.append(seen)
        held, number = weakref.ref(seen), product.edge.output_nr  # type: ignore[union-attr]

        def keep(gradients: tuple[Tensor, ...]) -> None:
            if (mine := held()) is not None and gradients[number] is not None:
                mine.gradient = gradients[number].detach()

        product.edge.node.register_prehook(keep)  # type: ignore[union-attr]

    def _direction(self, matrix: Tensor) -> Tensor:
        """Return a fixed random vector of as many numbers as a matrix has columns."""
        key = matrix.shape[1], matrix.dtype, matrix.device
        if key not in self._directions:
            self._directions[key] = torch.randn(key[0], generator=torch.Generator().manual_seed(0)).to(matrix)
        return self._directions[key]

    def factors(self, matrices: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return factors of gradients that were seen since the last call, and forget them.

        Args:
            matrices: name of a weight -> its gradient [o, i] with the bias.

        Returns:
            name of a weight -> D [n, o] and X [n, i] with D^T X the gradient, of those for which this holds: what
            was clipped, or scaled, is so by one number, and what was accumulated is of all passes.
        """
        rows: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for seen in self._seen:
            if seen.gradient is not None and seen.product.name in matrices:
                pair = seen.product.output_rows(seen.gradient)[0], seen.product.input_rows()[0]
                rows.setdefault(seen.product.name, []).append(pair)
        self._seen, self._passes, self._rows, self._left_out, self._taken = [], 0, {}, set(), True
        found = {}
        for name, pairs in rows.items():
            matrix, layer = matrices[name], self._layers[name]
            d, x = (torch.cat(parts).to(matrix.dtype) for parts in zip(*pairs, strict=True))
            if layer.bias is not None:
                x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            # Along a fixed random direction, which takes one look at the gradient. What P and M then multiply must be
            # the gradient but for its rounding: a small rest that D^T X lacks may be where they are largest.
            v = self._direction(matrix)
            along = x @ v
            ours, theirs = d.mT @ along, matrix @ v
            scale = (ours @ theirs) / (ours @ ours)
            terms = (d.norm(dim=1) * x.norm(dim=1)).sum() * scale.abs()
            rounding = ROUNDING * torch.finfo(matrix.dtype).eps * terms
            found[name] = (scale * d, x, (scale * ours - theirs).norm() <= rounding)
        holds = read([close for *_, close in found.values()])
        return {name: (d, x) for (name, (d, x, _)), yes in zip(found.items(), holds, strict=True) if yes}


def _kept(leaf: Any, dtype: torch.dtype) -> Any:
    """Return what is kept of an argument: as the library's own passes run without autocast, of the dtype of weights."""
    if not isinstance(leaf, Tensor):
        return leaf
    is_half = leaf.dtype in (torch.float16, torch.bfloat16)
    return leaf.detach().to(dtype if is_half and torch.is_autocast_enabled(leaf.device.type) else leaf.dtype)


def _active_calls(model: nn.Module) -> int:
    """Count the calls of a module that are under way in this thread."""
    frame, code, count = sys._getframe(), nn.Module._call_impl.__code__, 0
    while frame is not None:
        count += frame.f_code is code and frame.f_locals.get("self") is model
        frame = frame.f_back  # type: ignore[assignment]
    return count


class _Weakly:
    """A hook that calls a method of an object while there is one, and then removes itself; copies do nothing."""

    def __init__(self, owner: ForwardHooks, method: str) -> None:
        self._owner: weakref.ref[ForwardHooks] | None = weakref.ref(owner)
        self._method = method
        self.handle: RemovableHandle | None = None

    def __call__(self, *args: Any) -> None:
        owner = None if self._owner is None else self._owner()
        if owner is not None:
            getattr(owner, self._method)(*args)
        elif self.handle is not None:
            self.handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"_owner": None, "_method": self._method, "handle": None}
