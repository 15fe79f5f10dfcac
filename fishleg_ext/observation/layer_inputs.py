"""Inputs of layers and gradients by their outputs, by hooks."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fishleg_ext.observation.forward import call, scalar_loss
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.observation.types import DrawLabels, Observation, Observer


class LayerObserver:
    """Inputs of the layers that own the weights, and gradients of each sample's loss by their outputs, by hooks."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        weights: Mapping[str, nn.Parameter],
        observer: Observer,
        draw: DrawLabels | None,
        chunk_bytes: int,
    ) -> None:
        self.model, self.loss_fn, self.observer, self.draw = model, loss_fn, observer, draw
        self.chunk_bytes = chunk_bytes
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        owners = {id(p): m for m in model.modules() for p in m.parameters(recurse=False)}
        self.layers = {name: owners[id(weight)] for name, weight in weights.items()}
        for module in self.layers.values():
            input_rows(module, None)
        self.backward = "output_gradients" in observer.observes
        self.outputs: list[tuple[str, Any]] = []  # of this forward pass: name and where its gradient will come by

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Keep a hook on every layer within this block."""
        handles = []
        try:
            for name, module in self.layers.items():
                handles.append(module.register_forward_hook(functools.partial(self._hook, name)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def run(self, inputs: Any, targets: Any, samples: int) -> None:
        """One forward pass, and a backward pass if gradients are observed."""
        if not self.backward:
            call(self.model, {}, inputs)
            return
        weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        self.outputs = []
        with torch.enable_grad():
            outputs = call(self.model, weights, inputs)
            reached, self.outputs = self.outputs, []
            if not reached:
                return
            scale: float | Tensor = 1.0
            if self.draw is not None:
                targets, scale = self.draw(pytree.tree_map(torch.detach, outputs), samples, samples)
            # One by one: the mean over several may weigh them by their targets.
            one = lambda i: pytree.tree_map(lambda x: x[i : i + 1], (outputs, targets))
            losses = torch.stack([scalar_loss(self.loss_fn, *one(i)) for i in range(samples)])
            loss = (losses * scale).sum()
        gradients = torch.autograd.grad(loss, [edge for _, edge in reached], allow_unused=True)
        for (name, _), gradient in zip(reached, gradients, strict=True):
            if gradient is not None:
                self._observe(name, "output_gradients", gradient, output_rows)

    def _hook(self, name: str, module: nn.Module, args: tuple, output: Tensor) -> None:
        x = args[0].detach()
        if "inputs" in self.observer.observes:
            self._observe(name, "inputs", x, input_rows)
        if self.backward and output.requires_grad:
            # Not the tensor itself: an operation in place may make it another one.
            self.outputs.append((name, torch.autograd.graph.get_gradient_edge(output)))

    def _observe(self, name: str, what: str, x: Tensor, rows: Callable[[nn.Module, Tensor], Tensor]) -> None:
        if not x.sum(dtype=torch.float64).isfinite() and not x.isfinite().all():
            raise ValueError(f"the {what.replace('_', ' ')} of the layer of {name} contain NaN or inf")
        module = self.layers[name]
        per_sample = rows(module, x[:1]).numel() * x.element_size()
        for part in x.split(max(1, self.chunk_bytes // max(1, per_sample))):
            observed: dict[str, Any] = {what: {name: rows(module, part)}}
            self.observer.update(Observation(len(part), **observed))


def output_rows(module: nn.Module, x: Tensor) -> Tensor:
    """Outputs of a Linear or Conv layer, or gradients by them, as [rows, fan_out]."""
    channels_last = x if isinstance(module, nn.Linear) else x.movedim(1, -1)
    return channels_last.reshape(-1, x.shape[-1] if isinstance(module, nn.Linear) else x.shape[1])


def input_rows(module: nn.Module, x: Tensor | None) -> Tensor:
    """Unfold what the weight of a Linear or Conv layer is multiplied by: [rows, fan_in], or [groups, rows, fan_in].

    Args:
        module: nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d.
        x: the layer's input, at least one sample; None only asks whether the module is supported.

    Raises:
        NotImplementedError: another module.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1]) if x is not None else torch.empty(0)
    if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        raise NotImplementedError(f"layer inputs of {type(module).__name__} are not observed, only of Linear and Conv")
    if x is None:
        return torch.empty(0)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    spatial = len(module.kernel_size)
    for dim in range(spatial):
        reach = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        x = x.unfold(2 + dim, reach, module.stride[dim])[..., :: module.dilation[dim]]
    x = x.unflatten(1, (module.groups, -1))  # [N, g, C / g, *positions, *kernel]
    positions = range(3, 3 + spatial)
    kernel = range(3 + spatial, 3 + 2 * spatial)
    # Written column by column, in which neighbours in the input stay neighbours: several times faster than by rows.
    columns = x.permute(1, 2, *kernel, 0, *positions).flatten(1, 1 + spatial).flatten(2)  # [g, fan_in, rows]
    return columns.mT if module.groups > 1 else columns[0].mT
