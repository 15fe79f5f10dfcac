"""Compares the products that were seen in a forward pass with autograd, sample by sample, so that none is missed.

No loss is needed: a random linear function of each sample's outputs takes its place, so that samples that a network is
sure of are verified like others. Three things are compared for some samples each, since a sum over samples would hide
rows that were swapped:

- the gradient D^T X put together from all products, with that by autograd in the same pass: a weight that also enters
  in another way, or unseen, is refused by name;
- outputs and gradient with those of the sample alone: where samples influence each other they differ;
- each row of D with that of all samples together: rows that several samples share differ.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.forward import call
from fishleg_ext.observation.outputs import OutputTree
from fishleg_ext.observation.products import Product, ProductRecorder

VERIFIED_SAMPLES = 3
Signature = tuple[tuple[Any, ...], ...]


class Verifier:
    """Verifies the products of a model's weights on some samples.

    Args:
        model: in eval mode.
        weights: name -> tensor that takes the place of the parameter.
        orientations: name -> how the weight is seen as a matrix.
        biases: name of a weight -> name and tensor of a bias that is to be added to each of its products.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, Tensor],
        orientations: Mapping[str, Orientation],
        biases: Mapping[str, tuple[str, Tensor]],
    ) -> None:
        self.model, self.orientations = model, orientations
        self.weights = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
        self.biases = {name: (bias, x.detach().requires_grad_()) for name, (bias, x) in biases.items()}
        self._free = [*self.weights.values(), *(x for _, x in self.biases.values())]
        self._generator = torch.Generator().manual_seed(0)

    def verify(self, chunk: Chunk) -> tuple[Signature, str]:
        """Verify the products of a forward pass.

        Returns:
            their sequence, and why samples cannot be observed together; empty where they can.

        Raises:
            NotImplementedError: a weight does not enter by products alone, by name.
        """
        recorder, outputs = self._forward(chunk)
        n, leaves = chunk.samples, outputs.leaves
        # Of a single sample, leaves need not have a dimension of samples.
        probed = [i for i, yes in enumerate(outputs.cuttable(n)) if (yes or n == 1) and _is_float(leaves[i])]
        probes = {i: torch.randn(leaves[i].shape, generator=self._generator).to(leaves[i]) for i in probed}
        chosen = sorted({0, n // 2, n - 1})
        total = self._gradients(recorder, [(leaves[i], probes[i]) for i in probed])
        single = [total]
        if n > 1:
            parts = [[(leaves[i], _only(probes[i], s)) for i in probed] for s in chosen]
            single = [self._gradients(recorder, part) for part in parts]
        eps = max(torch.finfo(x.dtype).eps for x in [*self._free, *(leaves[i] for i in probed)])
        bounds, mixed = self._check_products(recorder, single, total, eps)
        if n == 1:
            return recorder.signature, ""
        if mixed:
            return recorder.signature, f"rows of the inputs of {mixed} belong to several samples"
        return recorder.signature, self._compare_alone(chunk, chosen, recorder, outputs, probes, single, bounds, eps)

    def _gradients(self, recorder: ProductRecorder, outputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """Gradients of probed outputs by weights and biases, then by the outputs of products and lookups."""
        of_uses: list[GradientEdge | None] = [use.edge for use in recorder.products]
        of_uses += [use.edge for use in recorder.lookups]
        reached = [(x, probe) for x, probe in outputs if x.requires_grad]
        if not reached:
            return [None] * (len(self._free) + len(of_uses))
        wanted: list[Any] = [*self._free, *(edge for edge in of_uses if edge is not None)]
        tensors, probes = zip(*reached, strict=True)
        found = torch.autograd.grad(tensors, wanted, probes, retain_graph=True, allow_unused=True)
        remaining = iter(found)
        own: list[Tensor | None] = [next(remaining) for _ in self._free]
        return own + [None if edge is None else next(remaining) for edge in of_uses]

    def _forward(self, chunk: Chunk) -> tuple[ProductRecorder, OutputTree]:
        weights = self.weights | dict(self.biases.values())
        recorder = ProductRecorder(self.weights, self.orientations)
        with torch.enable_grad(), recorder:
            outputs = call(self.model, weights, chunk.inputs)
        return recorder, OutputTree(outputs)

    def _check_products(
        self,
        recorder: ProductRecorder,
        single: Sequence[Sequence[Tensor | None]],
        total: Sequence[Tensor | None],
        eps: float,
    ) -> tuple[list[dict[str, float]], str]:
        """Compare gradients from products with autograd's.

        Returns:
            for each sample what a gradient is at most, by name; and the name of a weight whose rows are shared.
        """
        first_use = len(self._free)
        made = [{name: torch.zeros_like(weight) for name, weight in self.weights.items()} for _ in single]
        made_bias = [{name: torch.zeros_like(x) for name, (_, x) in self.biases.items()} for _ in single]
        bounds = [dict.fromkeys(self.weights, 0.0) for _ in single]
        mixed = ""
        for k, product in enumerate(recorder.products):
            inputs = product.input_rows()
            of_all = total[first_use + k]
            for s, found in enumerate(single):
                gradient = found[first_use + k]
                if gradient is None:
                    continue
                rows = product.output_rows(gradient).to(inputs.dtype)
                self._add_product_(made[s][product.name], product, rows, inputs)
                if product.name in made_bias[s]:
                    first, last = product.outputs
                    made_bias[s][product.name][first:last] += rows.sum(1).flatten()
                bounds[s][product.name] += float((rows.norm(dim=-1) * inputs.norm(dim=-1)).sum())
                size = rows.norm(dim=-1)
                reached = size > tolerance(eps) * size.amax((0, 1), keepdim=True) if size.numel() else size.bool()
                if of_all is not None and _differ(product.output_rows(of_all).to(rows)[reached], rows[reached], eps):
                    mixed = mixed or product.name
        for k, lookup in enumerate(recorder.lookups, len(recorder.products)):
            for s, found in enumerate(single):
                if (gradient := found[first_use + k]) is not None:
                    lookup.add_gradient_(made[s][lookup.name], gradient)
        known = {product.name for product in recorder.products}
        for s, found in enumerate(single):
            for (name, own), expected in zip(made[s].items(), found, strict=False):
                floor = 16 * eps * bounds[s][name]
                if expected is None and name not in recorder.others and not own.any():
                    continue  # nothing depends on it here
                expected = torch.zeros_like(own) if expected is None else expected
                unseen = name in recorder.others and not expected.any()
                if unseen or _differ(own, expected, eps, floor):
                    raise NotImplementedError(self._refusal(name, recorder, name in known))
            for (name, own), expected in zip(made_bias[s].items(), found[len(self.weights) :], strict=False):
                expected = torch.zeros_like(own) if expected is None else expected
                if name in known and _differ(own, expected, eps, 16 * eps * float(own.abs().sum())):
                    raise NotImplementedError(
                        f"the bias {self.biases[name][0]} is not added to each product of {name}, as this curvature "
                        f"model has it; leave {name} out of params, or take one of gradients, such as 'fishleg'"
                    )
        return bounds, mixed

    def _add_product_(self, total: Tensor, product: Product, rows: Tensor, inputs: Tensor) -> None:
        """Add D^T X of one product to the gradient of its weight."""
        orientation = self.orientations.get(product.name) or Orientation.of(total.shape)
        first, last = product.outputs
        part = (rows.mT @ inputs).flatten(0, 1)  # [last - first, fan_in]
        matrix = total.new_zeros(total.numel() // max(1, orientation.fan_in), orientation.fan_in)
        matrix[first:last] = part.to(total.dtype)
        total += orientation.to_parameter(matrix.reshape(orientation.matrix_shape))

    def _refusal(self, name: str, recorder: ProductRecorder, is_known: bool) -> str:
        others = ", ".join(recorder.others.get(name, ()))
        if others:
            how = f"it enters {others} {'as well' if is_known else 'first'}"
        else:
            how = "it enters unseen: by a custom autograd function, or by compiled, scripted or fused code"
        return (
            f"the inputs of {name} cannot be observed, since it is not only multiplied by them: {how}. Curvature "
            "models of gradients can prune it ('block', 'fishleg', 'diagonal', 'low_rank'); or leave it out of params"
        )

    def _compare_alone(
        self,
        chunk: Chunk,
        chosen: Sequence[int],
        together: ProductRecorder,
        outputs: OutputTree,
        probes: Mapping[int, Tensor],
        single: Sequence[Sequence[Tensor | None]],
        bounds: Sequence[Mapping[str, float]],
        eps: float,
    ) -> str:
        """Say why outputs, gradients or inputs of samples are not as of each alone; nothing where they are."""
        energies = dict.fromkeys(self.weights, 0.0)
        for s, found, bound in zip(chosen, single, bounds, strict=True):
            recorder, alone = self._forward(chunk.part(s, s + 1))
            energies = {name: energy + energies[name] for name, energy in self._energies(recorder).items()}
            if len(alone.leaves) != len(outputs.leaves):
                return "the outputs have another structure for a single sample"
            probed = []
            for i, yes in enumerate(outputs.cuttable(chunk.samples)):
                mine, what = alone.leaves[i], f"the outputs{outputs.names[i]}"
                if not yes:
                    continue
                theirs = outputs.leaves[i][s : s + 1]
                if not isinstance(mine, Tensor) or mine.shape != theirs.shape:
                    return f"{what} are of another shape for a single sample"
                if _differ(theirs.detach(), mine.detach(), eps):
                    return f"{what} are others for a single sample: samples influence each other, or it is random"
                if i in probes:
                    probed.append((mine, probes[i][s : s + 1]))
            own = self._gradients(recorder, probed)
            for (name, weight), *both in zip(self.weights.items(), own, found, strict=False):
                a, b = (torch.zeros_like(weight) if x is None else x for x in both)
                if _differ(a, b, eps, 16 * eps * bound[name]):
                    return f"gradients of {name} are others for a single sample: samples influence each other"
        if len(chosen) == chunk.samples:
            for name, energy in self._energies(together).items():
                if abs(energy - energies[name]) > tolerance(eps) * energy:
                    return f"{name} has other inputs for a single sample: samples share them"
        return ""

    def _energies(self, recorder: ProductRecorder) -> dict[str, float]:
        """Name -> sum over rows x of (x . v)^2, with a fixed v."""
        total = dict.fromkeys(self.weights, 0.0)
        for product in recorder.products:
            rows = product.input_rows()
            v = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(1)).to(rows)
            total[product.name] += float((rows @ v).double().square().sum())
        return total


def tolerance(eps: float) -> float:
    """By what share two computations of the same in another order may differ."""
    return min(10 * eps**0.5, 0.2)


def _differ(a: Tensor, b: Tensor, eps: float, floor: float = 0.0) -> bool:
    """Whether two tensors differ by more than rounding."""
    if not _is_float(a):
        return not torch.equal(a, b)
    a, b = a.double(), b.double()
    return not (a - b).norm() <= tolerance(eps) * torch.maximum(a.norm(), b.norm()) + floor


def _only(probe: Tensor, sample: int) -> Tensor:
    """The probe of one sample, zero for the others."""
    single = torch.zeros_like(probe)
    single[sample] = probe[sample]
    return single


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
