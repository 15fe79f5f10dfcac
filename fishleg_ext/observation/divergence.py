"""Measures how far a network's outputs are from those of the dense network, without labels."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.progress import progress_bar
from fishleg_ext.observation.batches import CHUNK_SAMPLES, chunks
from fishleg_ext.observation.forward import call, running
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction, output_divergence


def divergence(
    model: nn.Module,
    dense: Mapping[str, Tensor],
    data: Iterable[Any],
    loss_fn: LossFunction | None,
    *,
    likelihood: Likelihood | None = None,
    skip: int = 0,
    num_samples: int,
    seed: int = 0,
    progress: bool = False,
) -> float:
    """The Kullback-Leibler divergence of a model's outputs from those with other parameters, a mean over samples.

    Where the quadratic model of the loss holds and the Fisher matrix is the true one, it is half of dw^T F dw, what
    pruning is predicted to cost.

    Args:
        model: any module; put into eval mode while this runs.
        dense: parameters and buffers of the dense network, by name.
        data, loss_fn, likelihood, seed, progress: see `observe`.
        skip: samples that are passed over first, those that the curvature was estimated from.
        num_samples: how many of the next ones are used.

    Raises:
        ValueError: there is no sample after those that are passed over, or the likelihood cannot be told.
    """
    device = next(iter(dense.values())).device
    between = output_divergence(loss_fn, likelihood)
    total, used, seen = 0.0, 0, 0
    with running(model, device, seed), progress_bar(what="divergence", total=num_samples, show=progress) as bar:
        for chunk in chunks(
            data, CHUNK_SAMPLES, skip + num_samples, device, own_loss=loss_fn is None, needs_targets=False
        ):
            start = min(chunk.samples, max(0, skip - seen))
            seen += chunk.samples
            if start == chunk.samples:
                continue
            held_out = chunk.part(start, chunk.samples)
            theirs = call(model, dense, held_out.inputs)
            ours = call(model, {}, held_out.inputs)
            total += float(between(theirs, ours, held_out.targets).sum(dtype=torch.float64))
            used += held_out.samples
            bar.update(held_out.samples)
    if not used:
        raise ValueError(
            f"expected data with samples after the first {skip}, which the curvature is estimated from, to hold out, "
            f"got {seen} in all"
        )
    return total / used
