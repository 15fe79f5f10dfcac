"""Compares the products that were seen in a forward pass with autograd, sample by sample, so that none is missed.

No loss is needed: a random linear function of each sample's outputs takes its place, so that samples that a network is
sure of are verified like others. Three things are compared for some samples each, since a sum over samples would hide
rows that were swapped:

- the gradient D^T X put together from all products, with that by autograd in the same pass: a weight that also enters
  in another way, or unseen, is refused by name;
- outputs and gradient with those of the sample alone: where samples influence each other they differ;
- each row of D with that of all samples together: rows that several samples share differ.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.common.waiting import read
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.forward import call
from fishleg_ext.observation.outputs import OutputTree
from fishleg_ext.observation.products import Product
from fishleg_ext.observation.recorder import ProductRecorder

VERIFIED_SAMPLES = 3
PART_BYTES = 2**26  # of unfolded inputs at a time
Signature = tuple[tuple[Any, ...], ...]


class NotProducts(NotImplementedError):
    """A weight does not enter by products alone.

    Attributes:
        name: of the weight.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


@dataclass
class _Made:
    """Gradients put together from products, of each sample, by name.

    Attributes:
        weights, biases: the gradients.
        bounds: what the norm of the gradient of a weight is at most.
        mixed: whether several samples share a row of a weight's inputs, and its name.
    """

    weights: list[dict[str, Tensor]]
    biases: list[dict[str, Tensor]]
    bounds: list[dict[str, Tensor]]
    mixed: list[tuple[Tensor, str]]


class Comparisons:
    """Collects what is found where two tensors differ; all are read at once, as each read waits for a GPU."""

    def __init__(self) -> None:
        self._found: list[tuple[Tensor | bool, str | NotProducts]] = []

    def add(self, differs: Tensor | bool, what: str | NotProducts) -> None:
        """Note what is found if this bool is True."""
        self._found.append((differs, what))

    def first(self) -> str:
        """Return the first that was found, and nothing where nothing differs; or raise it."""
        for differs, (_, what) in zip(read(torch.as_tensor(x) for x, _ in self._found), self._found, strict=True):
            if differs and isinstance(what, NotProducts):
                raise what
            if differs:
                return str(what)
        return ""


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
        self.names: frozenset[str] = frozenset()  # of the outputs whose first dimension is the sample
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
        alone: dict[int, tuple[ProductRecorder, OutputTree]] = {}
        if n > 1:
            alone = {s: self._forward(chunk.part(s, s + 1)) for s in sorted({0, n // 2, n - 1})}
            self.names = outputs.per_sample(alone[0][1], n)
        # Of a single sample, leaves need not have a dimension of samples.
        cut = [True] * len(leaves) if n == 1 else outputs.cuttable(n, self.names)
        probed = [i for i, yes in enumerate(cut) if yes and _is_float(leaves[i])]
        if not probed:
            if n > 1:
                return recorder.signature, "no output has the sample as its first dimension"
            raise NotImplementedError(
                f"the products of {', '.join(self.weights)} cannot be verified, since the outputs of the model hold no "
                "tensor of numbers; give it outputs that are tensors, or containers, dataclasses or objects of these"
            )
        probes = {i: torch.randn(leaves[i].shape, generator=self._generator).to(leaves[i]) for i in probed}
        total = self._gradients(recorder, [(leaves[i], probes[i]) for i in probed])
        single = [total]
        if n > 1:
            parts = [[(leaves[i], _only(probes[i], s)) for i in probed] for s in alone]
            single = [self._gradients(recorder, part) for part in parts]
        tensors = [*self._free, *(leaves[i] for i in probed), *(gradient for gradient in total if gradient is not None)]
        eps = max(map(epsilon, tensors))  # of the least precise, such as products under autocast
        made = self._put_together(recorder, single, total, eps)
        found = self._compare(made, recorder, single, eps)
        if n == 1:
            return recorder.signature, found.first()
        for mixed, name in made.mixed:
            found.add(mixed, f"rows of the inputs of {name} belong to several samples")
        why = found.first()
        if not why:
            why = self._compare_alone(n, alone, recorder, outputs, probes, single, made.bounds, eps).first()
        return recorder.signature, why

    def compare_last(self, chunk: Chunk, outputs: OutputTree) -> str:
        """Say why the outputs of the last sample are not as of it alone; nothing where they are."""
        last = chunk.samples - 1
        alone = call(self.model, self.weights, chunk.part(last, last + 1).inputs)
        found = Comparisons()
        self._compare_outputs(found, chunk.samples, last, outputs, OutputTree(alone))
        return found.first()

    def _compare_outputs(
        self, found: Comparisons, samples: int, s: int, outputs: OutputTree, alone: OutputTree
    ) -> bool:
        """Compare the outputs of a sample with those of it alone; False where not even the shapes are the same."""
        if alone.names != outputs.names:
            found.add(True, "the outputs have another structure for a single sample")
            return False
        fits = True
        for i, yes in enumerate(outputs.cuttable(samples, self.names)):
            mine, what = alone.leaves[i], f"the outputs{outputs.names[i]}"
            if not yes:
                continue
            theirs = outputs.leaves[i][s : s + 1]
            if not isinstance(mine, Tensor) or mine.shape != theirs.shape:
                found.add(True, f"{what} are of another shape for a single sample")
                fits = False
                continue
            eps = epsilon(mine) if _is_float(mine) else 0.0
            found.add(
                differ(theirs.detach(), mine.detach(), tolerance(eps)),
                f"{what} are others for a single sample: samples influence each other, or it is random",
            )
        return fits

    def _gradients(self, recorder: ProductRecorder, outputs: Sequence[tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        """Gradients of probed outputs by weights and biases, then by the outputs of products and lookups."""
        of_uses: list[GradientEdge | None] = [use.edge for use in recorder.products]
        of_uses += [use.edge for use in recorder.lookups]
        reached = [(x, probe) for x, probe in outputs if x.requires_grad]
        if not reached:
            return [None] * (len(self._free) + len(of_uses))
        wanted: list[Any] = [*self._free, *(edge for edge in of_uses if edge is not None)]
        tensors, probes = zip(*reached, strict=True)
        try:
            found = torch.autograd.grad(tensors, wanted, probes, retain_graph=True, allow_unused=True)
        except RuntimeError as error:
            raise NotImplementedError(
                f"the products of {', '.join(self.weights)} cannot be verified, since autograd cannot differentiate "
                f"the model by them (torch.utils.checkpoint can with use_reentrant=False): {error}"
            ) from error
        remaining = iter(found)
        own: list[Tensor | None] = [next(remaining) for _ in self._free]
        return own + [None if edge is None else next(remaining) for edge in of_uses]

    def _forward(self, chunk: Chunk) -> tuple[ProductRecorder, OutputTree]:
        weights = self.weights | dict(self.biases.values())
        recorder = ProductRecorder(self.weights, self.orientations)
        with torch.enable_grad(), recorder:
            outputs = call(self.model, weights, chunk.inputs)
        return recorder, OutputTree(outputs)

    def _put_together(
        self,
        recorder: ProductRecorder,
        single: Sequence[Sequence[Tensor | None]],
        total: Sequence[Tensor | None],
        eps: float,
    ) -> "_Made":
        """Put the gradient of each sample together from products and lookups."""
        first_use = len(self._free)
        made = _Made(
            [{name: torch.zeros_like(weight) for name, weight in self.weights.items()} for _ in single],
            [{name: torch.zeros_like(x) for name, (_, x) in self.biases.items()} for _ in single],
            [{name: x.new_zeros((), dtype=torch.float64) for name, x in self.weights.items()} for _ in single],
            [],
        )
        for k, product in enumerate(recorder.products):
            of_all, of_each = total[first_use + k], [found[first_use + k] for found in single]
            reached = [g for g in of_each if g is not None]
            sizes = [None if g is None else g.double().norm() for g in of_each]
            for inputs, *gradients in _parts(product, [*reached] if of_all is None else [of_all, *reached]):
                all_rows = None if of_all is None else gradients.pop(0)
                for s, size in enumerate(sizes):
                    if size is None:
                        continue
                    rows = gradients.pop(0).to(inputs.dtype)
                    self._add_product_(made.weights[s][product.name], product, rows, inputs)
                    if product.name in made.biases[s]:
                        first, last = product.outputs
                        made.biases[s][product.name][first:last] += rows.sum(1).flatten()
                    norms = rows.norm(dim=-1)
                    made.bounds[s][product.name] += (norms * inputs.norm(dim=-1)).sum()
                    mine = (norms > tolerance(eps) * size / max(1, norms.numel()) ** 0.5)[..., None]
                    if all_rows is not None:
                        together = torch.where(mine, all_rows.to(rows), 0)
                        mixed = differ(together, torch.where(mine, rows, 0), tolerance(eps))
                        made.mixed.append((mixed, product.name))
        for k, lookup in enumerate(recorder.lookups, len(recorder.products)):
            for s, found in enumerate(single):
                if (gradient := found[first_use + k]) is not None:
                    lookup.add_gradient_(made.weights[s][lookup.name], gradient)
        return made

    def _compare(
        self, made: "_Made", recorder: ProductRecorder, single: Sequence[Sequence[Tensor | None]], eps: float
    ) -> Comparisons:
        """Compare gradients put together from products with those of autograd."""
        result = Comparisons()
        known = {product.name for product in recorder.products}
        for s, found in enumerate(single):
            for (name, own), expected in zip(made.weights[s].items(), found, strict=False):
                expected = torch.zeros_like(own) if expected is None else expected
                differs = differ(own, expected, rounding(eps), 2 * eps * made.bounds[s][name])
                if name in recorder.others:  # unseen here, where all is zero
                    differs = differs | ~expected.any()
                result.add(differs, NotProducts(name, self._refusal(name, recorder, name in known)))
            for (name, own), expected in zip(made.biases[s].items(), found[len(self.weights) :], strict=False):
                if name in known:
                    expected = torch.zeros_like(own) if expected is None else expected
                    result.add(
                        differ(own, expected, rounding(eps), 2 * eps * own.abs().sum()),
                        NotProducts(
                            name,
                            f"the bias {self.biases[name][0]} is not added to each product of {name}, as this "
                            f"curvature model has it; leave {name} out of params, or take one of gradients, such as "
                            "'fishleg'",
                        ),
                    )
        return result

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
        samples: int,
        alone: Mapping[int, tuple[ProductRecorder, OutputTree]],
        together: ProductRecorder,
        outputs: OutputTree,
        probes: Mapping[int, Tensor],
        single: Sequence[Sequence[Tensor | None]],
        bounds: Sequence[Mapping[str, Tensor]],
        eps: float,
    ) -> Comparisons:
        """Compare outputs, gradients and inputs of samples with those of each alone."""
        result = Comparisons()
        energies: dict[str, Tensor] = dict.fromkeys(self.weights, torch.zeros(()))
        for (s, (recorder, own_outputs)), found, bound in zip(alone.items(), single, bounds, strict=True):
            energies = {name: energy + energies[name] for name, energy in self._energies(recorder).items()}
            if not self._compare_outputs(result, samples, s, outputs, own_outputs):
                return result
            own = self._gradients(recorder, [(own_outputs.leaves[i], x[s : s + 1]) for i, x in probes.items()])
            noise = 16 * eps * largest_norm(found[: len(self.weights)])
            for (name, weight), *both in zip(self.weights.items(), own, found, strict=False):
                a, b = (torch.zeros_like(weight) if x is None else x for x in both)
                result.add(
                    differ(a, b, tolerance(eps), 16 * eps * bound[name] + noise),
                    f"gradients of {name} are others for a single sample: samples influence each other",
                )
        if len(alone) == samples:
            for name, energy in self._energies(together).items():
                result.add(
                    (energy - energies[name]).abs() > tolerance(eps) * energy,
                    f"{name} has other inputs for a single sample: samples share them",
                )
        return result

    def _energies(self, recorder: ProductRecorder) -> dict[str, Tensor]:
        """Name -> sum over rows x of (x . v)^2, with a fixed v."""
        total = {name: x.new_zeros((), dtype=torch.float64) for name, x in self.weights.items()}
        for product in recorder.products:
            for (rows,) in _parts(product, []):
                v = torch.randn(rows.shape[-1], generator=torch.Generator().manual_seed(1)).to(rows)
                total[product.name] += (rows @ v).double().square().sum()
        return total


def _parts(product: Product, gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Rows of the inputs of a product and of gradients by its output, a part of bounded size at a time."""
    if not product.divisible or not product.inputs.numel():
        yield [product.input_rows(), *map(product.output_rows, gradients)]
        return
    one = product.input_rows(product.inputs[:1])
    step = max(1, PART_BYTES // max(1, one.numel() * one.element_size()))
    for start in range(0, len(product.inputs), step):
        part = slice(start, start + step)
        yield [product.input_rows(product.inputs[part]), *(product.output_rows(g[part]) for g in gradients)]


def largest_norm(gradients: Iterable[Tensor | None]) -> Tensor:
    """Return the largest norm: by a share of it all gradients are off, the smallest too, as one pass rounds them."""
    norms = [wide_norm(gradient) for gradient in gradients if gradient is not None]
    return torch.stack(norms).max() if norms else torch.zeros((), dtype=torch.float64)


def tolerance(eps: float) -> float:
    """Return by what share the results of a network may differ for another size of its batch."""
    return min(10 * eps**0.5, 0.2)


def rounding(eps: float) -> float:
    """Return by what share two sums of the same products may differ."""
    return min(64 * eps, 0.06)


def epsilon(x: Tensor) -> float:
    """Relative precision of products: of TensorFloat32 where a GPU may use it."""
    eps = torch.finfo(x.dtype).eps
    return max(eps, 2.0**-10) if x.is_cuda and x.dtype == torch.float32 else eps


def differ(a: Tensor, b: Tensor, share: float, floor: float | Tensor = 0.0) -> Tensor:
    """Tell whether two tensors of one shape differ by more than a share of their norm, as a bool tensor."""
    if not _is_float(a):
        return (a != b).any()
    a, b = (x.float() if x.dtype.itemsize < 4 else x for x in (a, b))
    return ~(wide_norm(a - b) <= share * torch.maximum(wide_norm(a), wide_norm(b)) + floor)


def wide_norm(x: Tensor) -> Tensor:
    """Return the norm of all entries, summed in float64."""
    return torch.linalg.vector_norm(x, dtype=torch.float64)


def _only(probe: Tensor, sample: int) -> Tensor:
    """The probe of one sample, zero for the others."""
    single = torch.zeros_like(probe)
    single[sample] = probe[sample]
    return single


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()
