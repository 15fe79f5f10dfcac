"""Gradients of groups of samples, and products with the Fisher matrix."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.forward import call, scalar_loss
from fishleg_ext.observation.likelihoods import LossFunction, LossHessian
from fishleg_ext.observation.types import DrawLabels, FisherProduct

COPIES = 3  # of its own size that a vectorised gradient takes while it is computed


def gradient_bytes(weights: Iterable[Tensor]) -> int:
    """Memory that one gradient of these weights takes while it is computed among others."""
    return COPIES * sum(weight.numel() * weight.element_size() for weight in weights)


class GradientObserver:
    """Gradients of the mean loss over groups of samples, by vmap where the model allows it."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        weights: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        draw: DrawLabels | None,
        orientations: Mapping[str, Orientation],
    ) -> None:
        self.model, self.loss_fn, self.masks, self.draw = model, loss_fn, masks, draw
        self._orientations = orientations
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.vectorized: bool | None = None
        self.any_nonzero = False

    def gradients(self, chunk: Chunk, count: int) -> dict[str, Tensor]:
        """`count` gradients, each of as many of the samples; name -> [count, *matrix_shape]."""
        scale: float | Tensor = 1.0
        if self.draw is not None:
            outputs = call(self.model, self.weights, chunk.inputs)
            targets, scale = self.draw(outputs, chunk.targets, chunk.samples, count)
            chunk = chunk.with_targets(targets)
        return self._oriented(self._masked(self._compute(chunk, count), scale))

    def fisher_product(self, chunk: Chunk, hessian: LossHessian) -> FisherProduct:
        """J^T H J v, J the outputs' derivative by the weights and H the loss's second one by the outputs."""
        function = lambda weights: call(self.model, weights, chunk.inputs)
        known = self._orientations

        def multiply(v: Mapping[str, Tensor]) -> dict[str, Tensor]:
            v = {name: known[name].to_parameter(x) if name in known else x for name, x in v.items()}
            tangents = {name: v.get(name, torch.zeros_like(x)).to(x.dtype) for name, x in self.weights.items()}
            outputs, tangent = jvp(function, (self.weights,), (tangents,))[:2]
            return self._oriented(vjp(function, self.weights)[1](hessian(outputs, tangent))[0])

        return multiply

    def _oriented(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        known = self._orientations
        return {name: known[name].to_matrix(x) if name in known else x for name, x in tensors.items()}

    def _compute(self, chunk: Chunk, count: int) -> dict[str, Tensor]:
        """Gradients of `count` groups of samples."""
        if self.vectorized is False or not chunk.divisible:
            return self._loop(chunk, count)
        leaves, spec = pytree.tree_flatten((chunk.inputs, chunk.targets))
        groups = [leaf.unflatten(0, (count, -1)) for leaf in leaves if isinstance(leaf, Tensor)]

        def loss(weights: dict[str, Tensor], tensors: list[Tensor]) -> Tensor:
            parts = iter(tensors)
            whole = [next(parts) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._loss(weights, *pytree.tree_unflatten(whole, spec))

        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
                values = vmap(grad(loss), in_dims=(None, 0), randomness="different")(self.weights, groups)
        except Exception as error:
            if self.vectorized:  # it worked before, so this is not about vmap
                raise
            values = self._loop(chunk, count)  # raises what is wrong with the model or the data itself
            self.vectorized = False
            reason = str(error).strip().splitlines()
            warnings.warn(
                "torch.func.vmap cannot run this model, so gradients are computed one by one, which is slower: "
                f"{reason[0] if reason else type(error).__name__}",
                stacklevel=2,
            )
        else:
            self.vectorized = True
        return values

    def _loss(self, values: dict[str, Tensor], inputs: Any, targets: Any) -> Tensor:
        return scalar_loss(self.loss_fn, call(self.model, values, inputs), targets)

    def _loop(self, chunk: Chunk, count: int) -> dict[str, Tensor]:
        """The same by plain autograd, for models that torch.func cannot run."""
        weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        result = {name: weight.new_zeros((count, *weight.shape)) for name, weight in self.weights.items()}
        size = chunk.samples // count
        for i in range(count):
            buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}  # may be written to
            group = chunk.part(i * size, (i + 1) * size)
            with torch.enable_grad():
                loss = self._loss(weights | buffers, group.inputs, group.targets)
            if not loss.requires_grad:
                continue
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
            for name, gradient in zip(result, found, strict=True):
                if gradient is not None:
                    result[name][i] = gradient
        return result

    def _masked(self, values: dict[str, Tensor], scale: float | Tensor) -> dict[str, Tensor]:
        """Finite, scaled (all, or each gradient), and zero where a mask is False; in place."""
        sums = torch.stack([value.sum(dtype=torch.float64) for value in values.values()])
        if not sums.isfinite().all():
            bad = [name for name, value in values.items() if not value.isfinite().all()]
            if bad:
                raise ValueError(f"the gradients of {', '.join(bad)} contain NaN or inf")
        self.any_nonzero = self.any_nonzero or any(bool(value.any()) for value in values.values())
        for name, value in values.items():
            if 0 in value.stride():  # a gradient that is zero for all may be expanded
                values[name] = value = value.clone()
            if isinstance(scale, Tensor):
                value *= scale.view(-1, *[1] * (value.dim() - 1))
            elif scale != 1:
                value *= scale
            if name in self.masks:
                value *= self.masks[name]
        return values
