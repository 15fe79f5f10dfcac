"""Runs a model over data and hands a curvature model what it observes, a chunk at a time.

The model runs in eval mode, so that BatchNorm uses its running statistics and dropout is off. Nothing of the model is
changed: parameters are replaced functionally, training flags and PyTorch's RNG are put back.
"""

import functools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.progress import progress_bar
from fishleg_ext.observation.batches import CHUNK_SAMPLES, chunks
from fishleg_ext.observation.forward import running
from fishleg_ext.observation.gradients import GradientObserver, gradient_bytes
from fishleg_ext.observation.layer_inputs import LayerObserver
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction, label_sampler, loss_hessian
from fishleg_ext.observation.types import DrawLabels, Observation, Observer

# Memory for gradients, or for unfolded layer inputs, beside the activations of at most CHUNK_SAMPLES samples. One
# gradient is computed in any case.
CHUNK_BYTES = 2**28


def observe(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction,
    observer: Observer,
    weights: Mapping[str, nn.Parameter],
    *,
    masks: Mapping[str, Tensor] | None = None,
    num_grads: int = 1024,
    grad_batch_size: int = 1,
    labels: str = "data",
    likelihood: Likelihood | None = None,
    seed: int = 0,
    chunk_bytes: int = CHUNK_BYTES,
    progress: bool = False,
) -> int:
    """Feed a curvature model with gradients or layer inputs of the given weights.

    Args:
        model: any module; put into eval mode while this runs.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords).
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        observer: its `observes` says what is computed; its `update` gets it.
        weights: name -> parameter of the model.
        masks: name -> bool tensor, True = kept; gradients of the pruned are zero.
        num_grads: gradients in all; for layer inputs, num_grads * grad_batch_size samples.
        grad_batch_size: samples whose mean loss one gradient is of.
        labels: "data", or "model": targets sampled from the model's own likelihood (true Fisher).
        likelihood: for labels="model"; "categorical", "gaussian", "bernoulli" or (outputs, generator) -> targets.
            May be None with cross_entropy.
        seed: of the sampled labels, and of PyTorch's RNG while the data is read.
        chunk_bytes: memory for gradients or for unfolded inputs at a time.
        progress: show a progress bar.

    Returns:
        how many gradients were used. If the data ends early, a warning says so.

    Raises:
        ValueError: no data; gradients with NaN or inf, by parameter; labels="model" without a likelihood.
        TypeError: data that does not yield pairs of batches of tensors.
    """
    wanted = observer.observes
    known = [{"gradients"}, {"gradients", "fisher_products"}, {"inputs"}, {"output_gradients"}]
    if wanted not in [*known, {"inputs", "output_gradients"}]:
        raise ValueError(
            "expected a curvature model to observe gradients and perhaps fisher_products, or inputs and "
            f"output_gradients, got {', '.join(sorted(wanted)) or 'nothing'}"
        )
    hessian = loss_hessian(loss_fn, likelihood) if "fisher_products" in wanted else None
    device = next(iter(weights.values())).device
    needs_labels = wanted != {"inputs"}
    sampler = label_sampler(labels, loss_fn, likelihood) if needs_labels else None
    generator = torch.Generator(device).manual_seed(seed)
    draw: DrawLabels | None = None if sampler is None else functools.partial(sampler.draw, generator)
    source: GradientObserver | None = None
    with (
        running(model, device, seed),
        progress_bar(what="gradients", total=num_grads, show=progress) as bar,
    ):
        if "gradients" in wanted:
            source = GradientObserver(model, loss_fn, weights, masks or {}, draw)
            per_gradient = gradient_bytes(weights.values())
            chunk = max(1, min(chunk_bytes // max(1, per_gradient), CHUNK_SAMPLES // grad_batch_size))
            limit = num_grads * grad_batch_size
            used = 0
            for inputs, targets, samples in chunks(data, chunk * grad_batch_size, limit, device):
                count = samples // grad_batch_size
                if count:
                    samples = count * grad_batch_size  # a gradient of the few left over would count as much
                elif not used:
                    count = 1  # fewer samples in all than one gradient is to have
                if count:
                    gradients = source.gradients(inputs, targets, samples, count)
                    product = source.fisher_product(inputs, samples, hessian) if hessian else None
                    observer.update(Observation(count, gradients=gradients, fisher_product=product))
                    del gradients  # before the next chunk's are computed
                used += count
                bar.update(count)
        else:
            bar.set_description("layers")
            layers = LayerObserver(model, loss_fn, weights, observer, draw, chunk_bytes)
            used = 0
            with layers.hooked():
                for inputs, targets, samples in chunks(data, CHUNK_SAMPLES, num_grads * grad_batch_size, device):
                    layers.run(inputs, targets, samples)
                    used += samples
                    bar.update(samples)
            used = -(-used // grad_batch_size)
    if used == 0:
        raise ValueError("expected data that yields at least one sample, got none")
    if source is not None and not source.any_nonzero:
        warnings.warn("every gradient is zero: does the loss fit the model's outputs?", stacklevel=2)
    if used < num_grads:
        warnings.warn(
            f"the data ended after {used} of num_grads={num_grads} gradients; these are used",
            stacklevel=2,
        )
    return used
