"""The mean loss over samples, and its gradient."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.observation.batches import CHUNK_SAMPLES, chunks
from fishleg_ext.observation.forward import call, running, scalar_loss
from fishleg_ext.observation.likelihoods import LossFunction


def mean_gradient(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction,
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
    used = 0
    with running(model, device, seed), progress_bar(what="mean gradient", total=num_samples, show=progress) as bar:
        for inputs, targets, samples in chunks(data, CHUNK_SAMPLES, num_samples, device):
            free = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
            with torch.enable_grad():
                loss = samples * scalar_loss(loss_fn, call(model, free, inputs), targets)
            grads = torch.autograd.grad(loss, list(free.values()), allow_unused=True)
            for name, gradient in zip(free, grads, strict=True):
                if gradient is not None:
                    total[name] += gradient
            used += samples
            bar.update(samples)
    if not used:
        raise ValueError("expected data that yields at least one sample, got none")
    for name, gradient in total.items():
        if not gradient.isfinite().all():
            raise ValueError(f"the gradient of {name} contains NaN or inf")
    return {name: gradient / used for name, gradient in total.items()}


def losses_along(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction,
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
    with running(model, device, seed), progress_bar(what="step length", total=num_samples, show=progress) as bar:
        for inputs, targets, samples in chunks(data, CHUNK_SAMPLES, num_samples, device):
            for index, share in enumerate(shares):
                there = {name: (weight - share * direction[name]).to(weight.dtype) for name, weight in weights.items()}
                total[index] += samples * scalar_loss(loss_fn, call(model, there, inputs), targets)
            used += samples
            bar.update(samples)
    return (total / used).tolist()
