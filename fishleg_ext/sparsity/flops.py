"""How many operations pruning a weight saves: how often a forward pass uses it."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from fishleg_ext.observation.batches import CHUNK_SAMPLES, chunks
from fishleg_ext.observation.forward import call, running
from fishleg_ext.observation.recorder import ProductRecorder
from fishleg_ext.sparsity.parameters import orientations_of


def flops_per_weight(
    model: nn.Module,
    data: Iterable[Any],
    weights: Mapping[str, nn.Parameter],
    *,
    seed: int = 0,
) -> dict[str, float]:
    """Multiplications by each weight of a parameter in a forward pass, a mean over the first samples of the data.

    A weight of a Linear layer is used once for each vector that the layer transforms, that of a convolution once for
    each position of its output (of its input, if it is transposed). All products of a parameter add up; of those of a
    part of its outputs the mean over all outputs counts.

    Args:
        model: any module; put into eval mode while this runs.
        data: iterable of (inputs, targets) batches.
        weights: name -> parameter of the model.
        seed: of PyTorch's RNG.

    Raises:
        ValueError: no data, or a parameter that no inputs are multiplied by.

    Examples:
        >>> import torch
        >>> conv = nn.Conv2d(3, 4, 3)
        >>> flops_per_weight(conv, [(torch.zeros(2, 3, 8, 8), torch.zeros(2))], {"weight": conv.weight})
        {'weight': 36.0}
    """
    known = orientations_of(model, weights)
    device = next(iter(weights.values())).device
    recorder = ProductRecorder({name: weight.detach() for name, weight in weights.items()}, known)
    with running(model, device, seed):
        chunk = next(chunks(data, CHUNK_SAMPLES, CHUNK_SAMPLES, device, needs_targets=False), None)
        if chunk is None:
            raise ValueError("expected data that yields at least one sample, got none")
        with recorder:
            call(model, {}, chunk.inputs)
    uses = dict.fromkeys(weights, 0.0)
    for product in recorder.products:
        first, last = product.outputs
        outputs = weights[product.name].numel() / known[product.name].fan_in
        uses[product.name] += product.uses * (last - first) / outputs / chunk.samples
    if unseen := [name for name, number in uses.items() if not number]:
        raise ValueError(
            f"expected weights that inputs are multiplied by, {', '.join(unseen)} is none in a forward pass of the "
            f"first {chunk.samples} samples; see params="
        )
    return uses
