"""Runs a model over data and hands a curvature model what it observes, a chunk at a time.

The model runs in eval mode, so that BatchNorm uses its running statistics and dropout is off. Nothing of the model is
changed: parameters are replaced functionally, training flags and PyTorch's RNG are put back.
"""

import contextlib
import dataclasses
import functools
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.memory import MOST_ON_CPU
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.observation.batches import CHUNK_SAMPLES, Chunk, chunks
from fishleg_ext.observation.forward import call, running, scalar_loss
from fishleg_ext.observation.gradients import GradientObserver
from fishleg_ext.observation.layers import LayerObserver
from fishleg_ext.observation.likelihoods import (
    IGNORED,
    LabelSampler,
    Likelihood,
    LossFunction,
    OwnLoss,
    label_sampler,
    loss_hessian,
    sample_loss,
)
from fishleg_ext.observation.types import DrawLabels, Observer
from fishleg_ext.observation.verification import VERIFIED_SAMPLES, differ, epsilon


def observe(
    model: nn.Module,
    data: Iterable[Any],
    loss_fn: LossFunction | None,
    observer: Observer,
    weights: Mapping[str, nn.Parameter],
    *,
    masks: Mapping[str, Tensor] | None = None,
    orientations: Mapping[str, Orientation] | None = None,
    biases: Mapping[str, tuple[str, Tensor]] | None = None,
    num_grads: int = 1024,
    grad_batch_size: int = 1,
    labels: str = "data",
    likelihood: Likelihood | None = None,
    seed: int = 0,
    chunk_bytes: int = MOST_ON_CPU,
    progress: bool = False,
    keep_outputs: Callable[[Any], None] | None = None,
) -> int:
    """Feed a curvature model with gradients or layer inputs of the given weights.

    Args:
        model: any module; put into eval mode while this runs.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords). With
            loss_fn=None a mapping may be both. Targets may be None where they are drawn from the outputs alone, or
            inputs alone are observed.
        loss_fn: (outputs, targets) -> scalar, the mean over the batch; None is the loss that the model returns.
        observer: its `observes` says what is computed; its `update` gets it.
        weights: name -> parameter of the model.
        masks: name -> bool tensor, True = kept; gradients of the pruned are zero.
        orientations: name -> how a parameter is seen as a matrix; the default one where there is none.
        biases: name of a weight -> name and tensor of a bias that is added to each of its products.
        num_grads: gradients in all; for layer inputs, num_grads * grad_batch_size samples.
        grad_batch_size: samples whose mean loss one gradient is of.
        labels: "data", or "model": targets sampled from the model's own likelihood (true Fisher).
        likelihood: for labels="model"; a name of `LIKELIHOODS` or (outputs, generator) -> targets. May be None with
            cross_entropy.
        seed: of the sampled labels, and of PyTorch's RNG while the data is read.
        chunk_bytes: memory for gradients or for inputs as rows at a time, beside the activations of at most
            CHUNK_SAMPLES samples. One gradient is computed in any case.
        progress: show a progress bar.
        keep_outputs: called with the model's outputs for some samples after the others, where inputs alone are
            observed.

    Returns:
        how many gradients were used. If the data ends early, a warning says so.

    Raises:
        ValueError: no data; gradients with NaN or inf, by parameter; labels="model" without a likelihood.
        TypeError: data that does not yield pairs of batches of tensors.
        NotImplementedError: inputs of a weight that does not enter by products alone, by name.
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
    own_loss, loss_fn = loss_fn is None, sample_loss(loss_fn)
    limit, used, left_over, number, nonzero = num_grads * grad_batch_size, 0, 0, 0, True
    read = functools.partial(
        chunks,
        data,
        limit=limit,
        device=device,
        own_loss=own_loss if needs_labels else None,
        needs_targets=needs_labels and sampler is None,
    )
    with (
        running(model, device, seed),
        progress_bar(what="gradients", total=num_grads, show=progress) as bar,
    ):
        # Labels are drawn for a chunk at a time, so that its size must not depend on memory.
        by = grad_batch_size if "gradients" in wanted else 1
        stream = read(size=max(1, CHUNK_SAMPLES // by) * by)
        if own_loss and needs_labels:
            loss_fn, stream = known_loss(model, weights, stream)
        draw = drawing(sampler, loss_fn, device, seed)
        if "gradients" in wanted:
            source = GradientObserver(
                model, loss_fn, weights, masks or {}, draw, orientations or {}, biases or {}, chunk_bytes
            )
            for chunk in stream:
                if not chunk.divisible and grad_batch_size > 1:
                    raise ValueError(
                        f"grad_batch_size={grad_batch_size} cannot be combined with samples that cannot be put together"
                    )
                count = chunk.samples // grad_batch_size
                if count:
                    # A gradient of the few left over would count as much.
                    left_over += chunk.samples - count * grad_batch_size
                    chunk = chunk.part(0, count * grad_batch_size)
                elif not used:
                    count = 1  # fewer samples in all than one gradient is to have
                else:
                    left_over += chunk.samples
                if count:
                    product = None
                    if hessian:
                        _require_all_targets(chunk.targets, getattr(loss_fn, "ignore_index", IGNORED))
                        product = source.fisher_product(chunk, hessian)
                    with _checking(source, number := number + 1):
                        for observation in source.gradients(chunk, count, product):
                            observer.update(observation)
                used += count
                bar.update(count)
            source.check()
            nonzero = source.any_nonzero
        else:
            bar.set_description("layers")
            layers = LayerObserver(
                model, loss_fn, weights, observer, draw, chunk_bytes, orientations or {}, biases or {}, keep_outputs
            )
            for chunk in stream:
                with _checking(layers, number := number + 1):
                    layers.run(chunk)
                used += chunk.samples
                bar.update(chunk.samples)
            layers.check()
            used = -(-used // grad_batch_size)
            nonzero = layers.any_nonzero
    if used == 0:
        raise ValueError("expected data that yields at least one sample, got none; can it be read again?")
    if not nonzero:
        warnings.warn("every gradient is zero: does the loss fit the model's outputs?", stacklevel=2)
    if used < num_grads:
        warnings.warn(
            f"the data ended after {used} of num_grads={num_grads} gradients; these are used"
            + (f" ({left_over} samples made up no gradient of {grad_batch_size})" if left_over else ""),
            stacklevel=2,
        )
    return used


def known_loss(
    model: nn.Module, weights: Mapping[str, Tensor], stream: Iterator[Chunk]
) -> tuple[LossFunction | None, Iterator[Chunk]]:
    """Find the loss that a model returns, a mean over the batch, so that it can be cut into those of samples.

    It must be the mean cross entropy of the first chunk, and have its gradients by these weights for some samples.

    Returns:
        the loss as a function of outputs and targets, and the chunks with targets for it; None, and the chunks as they
        are, where it is not the mean cross entropy of the first of them.
    """
    first = next(stream, None)
    if first is None:
        return None, stream
    stream = itertools.chain([first], stream)
    found = OwnLoss.of(call(model, {}, first.inputs), first.targets)
    few = first.part(0, min(VERIFIED_SAMPLES, first.samples)) if first.divisible else first
    if found is None or not _same_gradients(model, weights, few, found):
        return None, stream
    return found, (dataclasses.replace(chunk, own_loss=False) for chunk in stream)


def _same_gradients(model: nn.Module, weights: Mapping[str, Tensor], chunk: Chunk, loss: LossFunction) -> bool:
    """Tell whether a loss has the gradients of the one that the model returns, which may have terms of its own."""
    free = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    with torch.enable_grad():
        outputs = call(model, free, chunk.inputs)
        losses = [scalar_loss(None, outputs, None), loss(outputs, chunk.targets)]
    if not all(value.requires_grad for value in losses):
        return not any(value.requires_grad for value in losses)
    own, known = (
        torch.autograd.grad(value, [*free.values()], allow_unused=True, retain_graph=True) for value in losses
    )
    share = lambda x: max(64 * torch.finfo(torch.float32).eps, 4 * epsilon(x))  # losses are in single precision
    return all(
        not differ(a, b, share(a)) if a is not None and b is not None else a is b
        for a, b in zip(own, known, strict=True)
    )


def drawing(
    sampler: LabelSampler | None, loss_fn: LossFunction | None, device: torch.device, seed: int
) -> DrawLabels | None:
    """Return what draws labels with a generator of its own, and looks once whether the loss reads them.

    Args:
        sampler: draws them; None where they are those of the data.
        loss_fn: the loss of samples; None is the loss that the model returns, which is not looked at.
        device, seed: of the generator.
    """
    if sampler is None:
        return None
    generator = torch.Generator(device).manual_seed(seed)
    unchecked = loss_fn is not None

    def draw(outputs: Any, targets: Any, samples: int, count: int) -> tuple[Any, float | Tensor]:
        nonlocal unchecked
        result = sampler.draw(generator, outputs, targets, samples, count)
        if unchecked and loss_fn is not None:
            unchecked = False
            sampler.check(loss_fn, outputs, result[0])
        return result

    return draw


@contextlib.contextmanager
def _checking(source: GradientObserver | LayerObserver, number: int) -> Iterator[None]:
    """Look for NaN and inf after chunk 1, 2, 4, ..., as a GPU is waited for, and where a curvature model fails."""
    try:
        yield
    except RuntimeError:
        source.check()
        raise
    if number & (number - 1) == 0:
        source.check()


def _require_all_targets(targets: Any, ignore_index: int) -> None:
    """Raise ValueError where the loss leaves targets out, which products with the Fisher matrix know nothing of."""
    if isinstance(targets, Tensor) and not targets.is_floating_point() and bool((targets == ignore_index).any()):
        raise ValueError(
            f"products with the Fisher matrix cannot leave targets out, got some of {ignore_index}; learn from "
            "gradients, or give samples without these"
        )
