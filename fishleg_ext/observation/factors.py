"""Factors of the gradient of each sample: inputs X and output gradients D of every product, G = D^T X.

One backward pass gives D for all samples, without a gradient of the size of the weight for each. Which row is whose
is measured: a second backward pass, with the losses weighted by a number of its own for each sample, scales each row of
D by that of its sample, whatever the shape in which a layer was called.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.forward import call
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.observation.outputs import OutputTree, SampleLosses
from fishleg_ext.observation.recorder import ProductRecorder
from fishleg_ext.observation.verification import tolerance


class SampleFactors(NamedTuple):
    """Factors of one product of a weight matrix; of several the gradients add up.

    Attributes:
        inputs: X [groups, n, fan_in].
        output_gradients: D [groups, n, fan_out / groups], of each sample's own loss.
        samples: [groups, n], whose row it is; -1 where the row of D is zero.
        outputs: first row of the matrix that takes part, and the one after the last, in equal groups.
    """

    inputs: Tensor
    output_gradients: Tensor
    samples: Tensor
    outputs: tuple[int, int]

    def gradient(self, sample: int) -> Tensor:
        """Return D^T X of one sample, [last - first, fan_in] rows of the matrix."""
        mine = self.output_gradients * (self.samples == sample)[..., None]
        return (mine.mT @ self.inputs).flatten(0, 1)


def sample_factors(
    model: nn.Module,
    loss_fn: LossFunction,
    weights: Mapping[str, Tensor],
    chunk: Chunk,
    *,
    orientations: Mapping[str, Orientation] | None = None,
) -> dict[str, list[SampleFactors]]:
    """Factors of the gradients of all samples of a chunk.

    Args:
        model: in eval mode; `verification` says whether its weights enter by products alone.
        loss_fn: (outputs, targets) -> scalar, of one sample.
        weights: name -> parameter.
        chunk: the samples.
        orientations: name -> how a weight is seen as a matrix.

    Returns:
        name -> factors of each product that the loss depends on.

    Raises:
        CannotCut: the loss needs outputs that cannot be cut into samples.
        ValueError: a row belongs to several samples.
    """
    free = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    recorder = ProductRecorder(free, orientations)
    with torch.enable_grad(), recorder:
        outputs = call(model, free, chunk.inputs)
    products = [product for product in recorder.products if product.edge is not None]
    edges = [product.edge for product in products if product.edge is not None]
    found: dict[str, list[SampleFactors]] = {name: [] for name in weights}
    losses, tree = SampleLosses(loss_fn), OutputTree(outputs)
    losses.names = tree.per_sample(OutputTree(call(model, free, chunk.part(0, 1).inputs)), chunk.samples)
    tensors, by_outputs = losses.gradients(tree, chunk.targets, chunk.samples)
    if not edges or not tensors:
        return found
    own = 1 + torch.arange(chunk.samples, device=tensors[0].device) / chunk.samples
    scaled = [g * own.to(g).reshape(-1, *[1] * (g.dim() - 1)) for g in by_outputs]
    plain = torch.autograd.grad(tensors, edges, by_outputs, allow_unused=True, retain_graph=True)
    weighted = torch.autograd.grad(tensors, edges, scaled, allow_unused=True)
    for product, gradient, other in zip(products, plain, weighted, strict=True):
        if gradient is None or other is None:
            continue
        rows, others = product.output_rows(gradient), product.output_rows(other)
        square = rows.square().sum(-1)
        ratio = (rows * others).sum(-1) / square
        samples = ((ratio - 1) * chunk.samples).round().nan_to_num(-1).long().clamp(-1, chunk.samples - 1)
        error = (others - own.to(rows)[samples.clamp(min=0)][..., None] * rows).square().sum(-1)
        if not (error <= tolerance(torch.finfo(rows.dtype).eps) ** 2 * square).all():
            raise ValueError(f"rows of {product.name} belong to several samples, whose gradients have no such factors")
        samples = samples.where(square > 0, -1)
        found[product.name].append(SampleFactors(product.input_rows(), rows, samples, product.outputs))
    return found
