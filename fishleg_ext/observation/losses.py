"""The mean loss over samples, each alone, and its gradient."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.observation.batches import CHUNK_SAMPLES, Chunk, chunks
from fishleg_ext.observation.forward import call, running, scalar_loss
from fishleg_ext.observation.likelihoods import LossFunction, sample_loss
from fishleg_ext.observation.outputs import CannotCut, OutputTree, SampleLosses
from fishleg_ext.observation.verification import VERIFIED_SAMPLES, tolerance


def mean_gradient(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction | None,
    weights: Mapping[str, nn.Parameter],
    *,
    num_samples: int,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The gradient of the mean loss over the first `num_samples` samples, by the name of the parameter.

    Raises:
        ValueError: no data, or gradients with NaN or inf, by parameter.
        TypeError: data that does not yield pairs of batches of tensors.
    """
    device = next(iter(weights.values())).device
    total = {name: torch.zeros_like(weight, dtype=widened(weight.dtype)) for name, weight in weights.items()}
    losses, used = SampleLosses(sample_loss(loss_fn)), 0
    parts = _Parts(model, losses)
    with running(model, device, seed), progress_bar(what="mean gradient", total=num_samples, show=progress) as bar:
        for chunk in chunks(data, CHUNK_SAMPLES, num_samples, device, own_loss=loss_fn is None):
            for part in parts(chunk):
                free = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
                with torch.enable_grad():
                    outputs = call(model, free, part.inputs)
                    if part.samples == 1:
                        loss = scalar_loss(losses.loss_fn, outputs, part.targets)
                        grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
                    else:
                        found, by_outputs = losses.gradients(OutputTree(outputs), part.targets, part.samples)
                        grads = torch.autograd.grad(found, list(free.values()), by_outputs, allow_unused=True)
                for name, gradient in zip(free, grads, strict=True):
                    if gradient is not None:
                        total[name] += gradient
            used += chunk.samples
            bar.update(chunk.samples)
    if not used:
        raise ValueError("expected data that yields at least one sample, got none")
    for name, gradient in total.items():
        if not gradient.isfinite().all():
            raise ValueError(f"the gradient of {name} contains NaN or inf")
    return {name: gradient / used for name, gradient in total.items()}


def losses_along(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction | None,
    weights: Mapping[str, Tensor],
    direction: Mapping[str, Tensor],
    shares: Sequence[float],
    *,
    num_samples: int,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """The mean loss over the first `num_samples` samples at weights - share * direction, for each share.

    Args:
        model, data, loss_fn, num_samples, seed, progress: see `observe`.
        weights, direction: name of a parameter -> tensor.
        shares: how far to go.
    """
    device = next(iter(weights.values())).device
    total, used = torch.zeros(len(shares), dtype=torch.float64, device=device), 0
    losses = SampleLosses(sample_loss(loss_fn))
    parts = _Parts(model, losses)
    with running(model, device, seed), progress_bar(what="step length", total=num_samples, show=progress) as bar:
        for chunk in chunks(data, CHUNK_SAMPLES, num_samples, device, own_loss=loss_fn is None):
            for part in parts(chunk):
                for index, share in enumerate(shares):
                    there = {name: (w - share * direction[name]).to(w.dtype) for name, w in weights.items()}
                    outputs = call(model, there, part.inputs)
                    if part.samples == 1:
                        total[index] += scalar_loss(losses.loss_fn, outputs, part.targets)
                    else:
                        values = losses.values(OutputTree(outputs), part.targets, part.samples)
                        total[index] += values.sum(dtype=torch.float64)
            used += chunk.samples
            bar.update(chunk.samples)
    return (total / used).tolist()


class _Parts:
    """Decides whether samples go through the model together, or one by one where they or their losses are not apart."""

    def __init__(self, model: nn.Module, losses: SampleLosses) -> None:
        self._model, self._losses = model, losses
        self._together: bool | None = None

    def __call__(self, chunk: Chunk) -> list[Chunk]:
        if chunk.samples == 1:
            return [chunk]
        if self._together is None:
            self._together = self._is_apart(chunk.part(0, min(VERIFIED_SAMPLES, chunk.samples)))
        return [chunk] if self._together else [chunk.part(s, s + 1) for s in range(chunk.samples)]

    def _is_apart(self, chunk: Chunk) -> bool:
        """Tell whether the losses of samples together are those of each alone."""
        parts = [chunk.part(s, s + 1) for s in range(chunk.samples)]
        alone = [call(self._model, {}, part.inputs) for part in parts]
        together = OutputTree(call(self._model, {}, chunk.inputs))
        self._losses.names = together.per_sample(OutputTree(alone[0]), chunk.samples)
        try:
            ours = self._losses.values(together, chunk.targets, chunk.samples)
        except CannotCut:
            return False
        pairs = zip(alone, parts, strict=True)
        theirs = torch.stack([scalar_loss(self._losses.loss_fn, outputs, part.targets) for outputs, part in pairs])
        share = tolerance(torch.finfo(theirs.dtype).eps)
        return bool(torch.allclose(ours.to(theirs), theirs, rtol=share, atol=share * float(theirs.abs().max())))
