"""Gradients of groups of samples, and products with the Fisher matrix."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.factors import FactorObserver, NoFactors
from fishleg_ext.observation.finite import Finite
from fishleg_ext.observation.forward import call, scalar_loss, training
from fishleg_ext.observation.gradient_factors import GradientFactors, LazyGradients
from fishleg_ext.observation.likelihoods import LossFunction, LossHessian, OwnLoss
from fishleg_ext.observation.types import DrawLabels, FisherProduct, Observation

COPIES = 3  # of its own size that a vectorised gradient takes while it is computed


def gradient_bytes(weights: Iterable[Tensor]) -> int:
    """Memory that one gradient of these weights takes while it is computed among others."""
    return COPIES * sum(weight.numel() * weight.element_size() for weight in weights)


def _steps(start: int, stop: int, step: int) -> list[tuple[int, int]]:
    """Cut a range into ranges of at most `step`."""
    return [(at, min(at + step, stop)) for at in range(start, stop, step)]


class GradientObserver:
    """Gradients of the mean loss over groups of samples: in factors where that can be, by vmap or one by one else.

    Args:
        model: in eval mode.
        loss_fn: (outputs, targets) -> scalar; None is the loss that the model returns.
        weights: name -> parameter.
        masks: name -> bool tensor, True = kept.
        draw: labels, where they are drawn.
        orientations: name -> how a parameter is seen as a matrix.
        biases: name of a weight -> name and tensor of a bias that is added to each of its products.
        chunk_bytes: memory for gradients at a time.
        bytes_of: (name of a weight, factors) -> memory of one gradient as it will be asked for; None is that of the
            weight itself.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        weights: Mapping[str, nn.Parameter],
        masks: Mapping[str, Tensor],
        draw: DrawLabels | None,
        orientations: Mapping[str, Orientation],
        biases: Mapping[str, tuple[str, Tensor]],
        chunk_bytes: int,
        bytes_of: Callable[[str, GradientFactors], int] | None = None,
    ) -> None:
        self.model, self.masks, self.draw = model, masks, draw
        self._of_model = isinstance(loss_fn, OwnLoss)  # which is left to the model where gradients have no factors
        self.loss_fn = None if self._of_model else loss_fn
        self._orientations, self._chunk_bytes = orientations, chunk_bytes
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self._bytes_of = bytes_of
        self.vectorized: bool | None = None
        self._in_factors: FactorObserver | None = None
        if loss_fn is not None:
            self._in_factors = FactorObserver(model, loss_fn, self.weights, draw, orientations, biases)
        self._bias_of = {bias: name for name, (bias, _) in biases.items()}
        self._seen = Finite()
        self._most_at_once: float = float("inf")  # gradients in factors

    @property
    def any_nonzero(self) -> bool:
        """Tell whether any gradient so far is not zero."""
        return self._seen.any_nonzero

    def gradients(
        self,
        chunk: Chunk,
        count: int,
        product: FisherProduct | None = None,
        *,
        cut: int = 0,
        trained: Sequence[nn.Module] = (),
    ) -> Iterator[Observation]:
        """Yield `count` gradients, each of as many of the samples, as many at a time as memory is given for.

        An observation ends after `cut` of them; the modules `trained` are in training mode meanwhile. With the last
        goes the product with the Fisher matrix. Where a GPU has no memory for the activations of all samples, halves of
        them are tried, whose labels are drawn anew.
        """
        factors: dict[str, GradientFactors] = {}
        found: tuple[Any, float | Tensor] | None = None
        if self._in_factors is not None and count <= self._most_at_once:
            try:
                factors, targets, scale = self._in_factors.factors(chunk, count, trained)
                found = targets, scale
            except NoFactors as reason:
                found = reason.drawn
                if chunk.samples > 1 and chunk.divisible:
                    self._in_factors = None
            except torch.OutOfMemoryError:
                if count == 1:
                    raise
                self._most_at_once = count // 2
        if self._in_factors is not None and count > self._most_at_once:
            half, group = count // 2, chunk.samples // count
            rest = chunk.part(half * group, chunk.samples)
            yield from self.gradients(chunk.part(0, half * group), half, cut=cut, trained=trained)
            yield from self.gradients(rest, count - half, product, cut=cut - half, trained=trained)
            return
        if found is None and self.draw is not None:
            with training(trained):
                outputs = call(self.model, self.weights, chunk.inputs)
            found = self.draw(outputs, chunk.targets, chunk.samples, count)
        targets, scale = found or (chunk.targets, 1.0)
        chunk = replace(chunk, own_loss=chunk.own_loss or self._of_model).with_targets(targets)
        for name in self.masks.keys() & factors.keys():
            mask = self._oriented({name: self.masks[name]})[name]
            factors[name] = replace(factors[name], mask=mask.reshape(factors[name].shape))
        for name, of_name in factors.items():
            for inputs, gradient in of_name.tensors():
                self._seen.see(name, inputs)
                self._seen.see(name, gradient, nonzero=True)
        known = {*factors, *(bias for bias, name in self._bias_of.items() if name in factors)}
        others = {name: weight for name, weight in self.weights.items() if name not in known}
        needed = max((self._bytes(name, of_name) for name, of_name in factors.items()), default=0)
        step = max(1, min(count, self._chunk_bytes // max(1, needed + gradient_bytes(others.values()))))
        group = chunk.samples // count
        cut = min(max(0, cut), count)
        for start, stop in [*_steps(0, cut, step), *_steps(cut, count, step)]:
            values: dict[str, Tensor] = {}
            if others:
                part_scale = scale[start:stop] if isinstance(scale, Tensor) else scale
                with training(trained):
                    values = self._compute(chunk.part(start * group, stop * group), stop - start, others)
                values = self._oriented(self._masked(values, part_scale))
            parts = {name: factor.part(start, stop) for name, factor in factors.items()}
            gradients = LazyGradients({name: self._getter(name, parts, values) for name in self.weights})
            last = product if stop == count else None
            yield Observation(stop - start, gradients=gradients, gradient_factors=parts, fisher_product=last)

    def check(self) -> None:
        """Raise ValueError where gradients had NaN or inf, by name of the parameter."""
        if bad := self._seen.bad():
            raise ValueError(f"the gradients of {', '.join(bad)} contain NaN or inf")

    def _bytes(self, name: str, factors: GradientFactors) -> int:
        if self._bytes_of is not None:
            return self._bytes_of(name, factors)
        return self.weights[name].numel() * self.weights[name].element_size()

    def _getter(
        self, name: str, factors: Mapping[str, GradientFactors], values: Mapping[str, Tensor]
    ) -> Callable[[], Tensor]:
        if name in values:
            return lambda: values[name]
        if name in factors:
            return lambda: self._multiplied_out(name, factors[name])
        return lambda: factors[self._bias_of[name]].bias_gradients()

    def _multiplied_out(self, name: str, factors: GradientFactors) -> Tensor:
        known = self._orientations.get(name)
        gradients = factors.gradients()
        gradients = gradients.reshape(-1, *(known.matrix_shape if known else self.weights[name].shape))
        if gradients.dtype == torch.float16:  # whose products may overflow
            self._seen.see(name, gradients)
        return gradients

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

    def _compute(self, chunk: Chunk, count: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients of `count` groups of samples by these weights."""
        if self.vectorized is False or not chunk.divisible:
            return self._loop(chunk, count, weights)
        leaves, spec = pytree.tree_flatten((chunk.inputs, chunk.targets))
        groups = [leaf.unflatten(0, (count, -1)) for leaf in leaves if isinstance(leaf, Tensor)]

        def loss(weights: dict[str, Tensor], tensors: list[Tensor]) -> Tensor:
            parts = iter(tensors)
            whole = [next(parts) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            return self._loss(weights, *pytree.tree_unflatten(whole, spec))

        try:
            with sdpa_kernel(SDPBackend.MATH):  # fused attention has no batching rule
                values = vmap(grad(loss), in_dims=(None, 0), randomness="different")(dict(weights), groups)
        except Exception as error:
            if self.vectorized:  # it worked before, so this is not about vmap
                raise
            values = self._loop(chunk, count, weights)  # raises what is wrong with the model or the data itself
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

    def _loop(self, chunk: Chunk, count: int, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The same by plain autograd, for models that torch.func cannot run."""
        result = {name: weight.new_zeros((count, *weight.shape)) for name, weight in weights.items()}
        weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
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
        """Scaled (all, or each gradient), and zero where a mask is False; in place. What is not finite is noted."""
        for name, value in values.items():
            self._seen.see(name, value, nonzero=True)
            if 0 in value.stride():  # a gradient that is zero for all may be expanded
                values[name] = value = value.clone()
            if isinstance(scale, Tensor):
                value *= scale.view(-1, *[1] * (value.dim() - 1))
            elif scale != 1:
                value *= scale
            if name in self.masks:
                value *= self.masks[name]
        return values
