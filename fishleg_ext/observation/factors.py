"""Gradients of samples in factors: G = D^T X, X the inputs of a product and D the gradients by its outputs.

One backward pass gives D for all samples, without a gradient of the size of the weights for each. Which row is whose is
measured once, on some samples: a second backward pass, with the losses weighted by a number of its own for each sample,
scales each row of D by that of its sample, whatever the shape in which a layer was called. Rows lie sample after
sample, or position after position with a row of each sample at each; what is neither has no factors here.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.forward import call
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.observation.outputs import CannotCut, OutputTree, SampleLosses
from fishleg_ext.observation.products import ROW_BYTES, Product
from fishleg_ext.observation.recorder import ProductRecorder
from fishleg_ext.observation.types import DrawLabels
from fishleg_ext.observation.verification import (
    VERIFIED_SAMPLES,
    NotProducts,
    Signature,
    Verifier,
    differ,
    epsilon,
    tolerance,
)


class NoFactors(Exception):
    """The gradients of these samples have no factors; the message says why.

    Attributes:
        drawn: targets and scale, where these were drawn before that was found.
    """

    drawn: tuple[Any, float | Tensor] | None = None


@dataclass(frozen=True, eq=False)
class Use:
    """One product of a weight, with what its rows need to be told apart.

    Attributes:
        product: of some samples.
        gradient: of each sample's own loss, by the output of the product.
        samples: how many there are.
        by_position: whether rows lie position after position, with a row of each sample at each; else sample after
            sample.
    """

    product: Product
    gradient: Tensor
    samples: int
    by_position: bool

    def rows(self, start: int, stop: int, group: int) -> tuple[Tensor, Tensor]:
        """Rows of groups of samples, from `start` to before `stop`.

        Args:
            start, stop: numbers of groups of samples.
            group: samples in each.

        Returns:
            X [groups, count, T, fan_in] and D [groups, count, T, fan_out / groups], groups being those of the product.
        """
        product, first, last = self.product, start * group, stop * group
        inputs, gradient, each = product.inputs, self.gradient, self._length
        if each:
            inputs, gradient = inputs[first * each : last * each], gradient[first * each : last * each]
        samples = last - first if each else self.samples
        x, d = product.input_rows(inputs), product.output_rows(gradient)
        part = None if each else slice(start, stop)
        return self._cut(x, samples, group, part), self._cut(d, samples, group, part)

    def sample_gradients(self, start: int, stop: int) -> Tensor | None:
        """Gradients of samples, [count, out, fan_in], where there is a faster way to them than by rows."""
        if self._length != 1:
            return None
        return self.product.sample_gradients(self.product.inputs[start:stop], self.gradient[start:stop])

    @property
    def num_rows(self) -> int:
        """Rows of X, and of D, for each group of the product."""
        first, last = self.product.outputs
        return self.gradient.numel() // max(1, last - first)

    @property
    def _length(self) -> int:
        """Entries of the first dimension for each sample, where that can be cut; else 0."""
        number = len(self.product.inputs)
        whole = number == len(self.gradient) and number % max(1, self.samples) == 0
        return number // max(1, self.samples) if whole and self.product.divisible and not self.by_position else 0

    def _cut(self, rows: Tensor, samples: int, group: int, part: slice | None) -> Tensor:
        length = rows.shape[1] // max(1, samples)
        if self.by_position:
            rows = rows.unflatten(1, (length, samples // group, group)).permute(0, 2, 3, 1, 4).flatten(2, 3)
        else:
            rows = rows.unflatten(1, (samples // group, group * length))
        return rows if part is None else rows[:, part]


class GradientFactors:
    """Gradients G_s = D_s^T X_s [out, fan-in] of groups of samples by one weight matrix, summed over its products.

    Attributes:
        count: how many gradients.
    """

    def __init__(self, uses: Sequence[Use], shape: tuple[int, int], like: Tensor, count: int, group: int) -> None:
        self._uses, self._shape, self._like, self._group = list(uses), shape, like, group
        self.count, self._start = count, 0

    def part(self, start: int, stop: int) -> "GradientFactors":
        """The gradients from `start` to before `stop`."""
        part = GradientFactors(self._uses, self._shape, self._like, stop - start, self._group)
        part._start = self._start + start
        return part

    @property
    def rows(self) -> int:
        """Rows of each sample's X and D, T."""
        return sum(use.num_rows // use.samples * self._group for use in self._uses)

    @property
    def whole(self) -> bool:
        """Whether each product is of the whole matrix, so that X and D of all of them can be put together."""
        return all(use.product.groups == 1 and use.product.outputs == (0, self._shape[0]) for use in self._uses)

    def tensors(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the inputs of each product, as the function was called with them, and the gradient by its output."""
        for use in self._uses:
            yield use.product.inputs, use.gradient

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Put X [count, T, fan_in] and D [count, T, out] together, where they are `whole`."""
        parts = [use.rows(self._start, self._start + self.count, self._group) for use in self._uses]
        x, d = (torch.cat([part[i][0] for part in parts], dim=1) if len(parts) > 1 else parts[0][i][0] for i in (0, 1))
        return x, d

    def gradients(self) -> Tensor:
        """Multiply out: [count, out, fan_in]."""
        if len(self._uses) == 1 and self.whole and self._group == 1:
            found = self._uses[0].sample_gradients(self._start, self._start + self.count)
            if found is not None:
                return found
        result = self._like.new_empty(self.count, *self._shape)
        if not (len(self._uses) == 1 and self.whole):
            result.zero_()
        for use in self._uses:
            (first, last), groups = use.product.outputs, use.product.groups
            for start, stop in self._slices(use):
                x, d = use.rows(self._start + start, self._start + stop, self._group)
                part = result[start:stop, first:last].unflatten(1, (groups, -1))
                for index in range(groups):
                    if len(self._uses) == 1 and self.whole:
                        torch.bmm(d[index].mT, x[index], out=part[:, index])
                    else:
                        part[:, index] += d[index].mT @ x[index]
        return result

    def bias_gradients(self) -> Tensor:
        """Sum over rows of D: [count, out], of a bias that is added to each product."""
        result = self._like.new_zeros(self.count, self._shape[0])
        for use in self._uses:
            first, last = use.product.outputs
            _, d = use.rows(self._start, self._start + self.count, self._group)
            result[:, first:last] += d.sum(2).transpose(0, 1).flatten(1)
        return result

    def _slices(self, use: Use) -> Iterator[tuple[int, int]]:
        """Parts of the gradients whose inputs as rows are of bounded size."""
        per_row = self._shape[1] * use.product.groups * self._like.element_size()
        per_gradient = per_row * use.num_rows // max(1, use.samples) * self._group
        step = max(1, ROW_BYTES // max(1, per_gradient))
        for start in range(0, self.count, step):
            yield start, min(start + step, self.count)


class FactorObserver:
    """Computes gradients in factors, by one forward and one backward pass of many samples.

    Samples must not influence each other, and weights enter by products alone: `verification` says so, once for each
    sequence of products, and the last sample of a batch is compared with it alone, in a number of batches that
    grows by the logarithm of theirs.

    Args:
        model: in eval mode.
        loss_fn: (outputs, targets) -> scalar.
        weights: name -> parameter.
        draw: labels, where they are drawn.
        orientations: name -> how a weight is seen as a matrix.
        biases: name of a weight -> name and tensor of a bias that is added to each of its products.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        weights: Mapping[str, Tensor],
        draw: DrawLabels | None,
        orientations: Mapping[str, Orientation],
        biases: Mapping[str, tuple[str, Tensor]],
    ) -> None:
        self._model, self._draw, self._orientations = model, draw, orientations
        bias_names = {bias for bias, _ in biases.values()}
        self._weights = {name: weight.detach() for name, weight in weights.items() if name not in bias_names}
        self._biases = {name: biases[name] for name in self._weights if name in biases}
        self._losses = SampleLosses(loss_fn)
        self._by_position: dict[Any, dict[int, bool]] = {}  # of each product, by its number
        self._verifier: Verifier | None = None
        self._batches = 0

    def factors(self, chunk: Chunk, count: int) -> tuple[dict[str, GradientFactors], Any, float | Tensor]:
        """Compute the factors of `count` gradients, each of as many of the samples.

        Returns:
            name of a weight, of those that have any -> factors; the targets, which may have been drawn; and what
            gradients of others are to be multiplied by, as of `LabelSampler.draw`.

        Raises:
            NoFactors: samples influence each other, or the loss cannot be cut into theirs, or no weight enters by
                products alone.
        """
        if chunk.samples == 1 or not chunk.divisible:
            raise NoFactors("a single sample")
        recorder, outputs = self._forward(chunk)
        if _sequence(recorder, chunk.samples) not in self._by_position:
            known = set(self._weights)
            self._verify(chunk, recorder.signature)
            if known != set(self._weights):
                recorder, outputs = self._forward(chunk)
            if _sequence(recorder, chunk.samples) not in self._by_position:
                raise NoFactors("the sequence of products is another for some of the samples")
        tree, targets = OutputTree(outputs), chunk.targets
        scale: float | Tensor = 1.0
        if self._draw is not None:
            detached = tree.with_leaves([x.detach() if isinstance(x, Tensor) else x for x in tree.leaves])
            targets, scale = self._draw(detached, targets, chunk.samples, count)
        try:
            return self._of_drawn(recorder, tree, chunk.with_targets(targets), scale, count), targets, scale
        except NoFactors as reason:
            reason.drawn = targets, scale
            raise

    def _of_drawn(
        self, recorder: ProductRecorder, tree: OutputTree, chunk: Chunk, scale: float | Tensor, count: int
    ) -> dict[str, GradientFactors]:
        """Compute the factors for these targets."""
        group = chunk.samples // count
        free, by_outputs = self._by_outputs(tree, chunk.targets, chunk.samples, group)
        if isinstance(scale, Tensor):
            own = scale.repeat_interleave(group)
            by_outputs = [g * own.to(g).reshape(-1, *[1] * (g.dim() - 1)) for g in by_outputs]
        elif scale != 1:
            by_outputs = [g * scale for g in by_outputs]
        uses = self._uses(recorder, free, by_outputs, chunk.samples)
        self._batches += 1
        if self._batches & (self._batches - 1) == 0:  # 1, 2, 4, ...
            self._compare_last(chunk, scale, uses, count, group)
        return {
            name: GradientFactors(uses[name], self._matrix_shape(name), weight, count, group)
            for name, weight in self._weights.items()
        }

    def _by_outputs(
        self, tree: OutputTree, targets: Any, samples: int, group: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return the outputs that require gradients, and the gradients of the losses by them."""
        assert self._verifier is not None
        self._losses.names = self._verifier.names
        try:
            return self._losses.gradients(tree, targets, samples, group)
        except CannotCut as what:
            raise NoFactors(f"the loss needs {what}, which cannot be cut into samples") from None
        except Exception as error:  # what is wrong with the loss itself is raised where it is called without this
            raise NoFactors(f"the loss of some samples cannot be computed: {error}") from error

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        weight = self._weights[name]
        shape = self._orientations[name].matrix_shape if name in self._orientations else weight.shape
        return shape[0], weight.numel() // max(1, shape[0])

    def _forward(self, chunk: Chunk) -> tuple[ProductRecorder, Any]:
        weights = {name: weight.detach().requires_grad_() for name, weight in self._weights.items()}
        recorder = ProductRecorder(weights, self._orientations)
        try:
            with torch.enable_grad(), recorder:
                outputs = call(self._model, weights, chunk.inputs)
        except Exception as error:  # of a model that takes single samples alone, say
            raise NoFactors(f"the model does not run on some samples together: {error}") from error
        return recorder, outputs

    def _uses(
        self, recorder: ProductRecorder, outputs: list[Tensor], by_outputs: list[Tensor], samples: int
    ) -> dict[str, list[Use]]:
        by_position = self._by_position[_sequence(recorder, samples)]
        numbered = [(i, product) for i, product in enumerate(recorder.products) if product.edge is not None]
        edges: list[Any] = [product.edge for _, product in numbered]
        uses: dict[str, list[Use]] = {name: [] for name in self._weights}
        if not edges or not outputs:
            return uses
        # Where the first dimension is not the sample, whose rows these are may have changed with the data.
        unsure = [i for i, p in numbered if by_position[i] or not p.divisible or len(p.inputs) != samples]
        found = torch.autograd.grad(outputs, edges, by_outputs, allow_unused=True, retain_graph=bool(unsure))
        made: dict[int, Use] = {}
        for (i, product), gradient in zip(numbered, found, strict=True):
            if gradient is not None:
                made[i] = Use(product, gradient, samples, by_position[i])
                uses[product.name].append(made[i])
        if unsure := [i for i in unsure if i in made]:
            own = _numbers(samples, by_outputs[0])
            weighted = [g * own.to(g).reshape(-1, *[1] * (g.dim() - 1)) for g in by_outputs]
            edges = [made[i].product.edge for i in unsure]
            for i, scaled in zip(unsure, torch.autograd.grad(outputs, edges, weighted, allow_unused=True), strict=True):
                use, rows = made[i], made[i].product.output_rows
                if scaled is None or not _fits(rows(use.gradient), rows(scaled), own, use.by_position):
                    raise NoFactors(f"rows of {use.product.name} belong to other samples than in the first batch")
        return uses

    def _verify(self, chunk: Chunk, signature: Signature) -> None:
        """Verify a new sequence of products; weights that enter in other ways are dropped."""
        part = chunk.part(0, min(VERIFIED_SAMPLES, chunk.samples))
        recorder, _ = self._forward(part)
        if recorder.signature != signature:  # which not all samples have
            part = chunk
        looked_up = {lookup.name for lookup in recorder.lookups}
        products = {product.name for product in recorder.products}
        for name in list(self._weights):
            if name in recorder.others or name in looked_up or name not in products:
                self._drop(name)
        while self._weights:
            self._verifier = Verifier(self._model, self._weights, self._orientations, self._biases)
            try:
                _, why_not = self._verifier.verify(part)
            except NotProducts as error:
                self._drop(error.name)
                continue
            except NotImplementedError as error:
                raise NoFactors(str(error)) from None
            if why_not:
                raise NoFactors(why_not)
            if not (unordered := self._measure_rows(part, self._verifier.names)):
                return
            for name in unordered:
                self._drop(name)
        raise NoFactors("no weight enters by products alone")

    def _drop(self, name: str) -> None:
        self._by_position = {}  # whose products are not among those of a signature any more
        del self._weights[name]
        self._biases.pop(name, None)

    def _measure_rows(self, chunk: Chunk, names: Collection[str]) -> set[str]:
        """Tell whose row is whose by random linear functions of the outputs, weighted by a number for each sample.

        Returns:
            the weights of which that cannot be told.
        """
        recorder, outputs = self._forward(chunk)
        tree, n = OutputTree(outputs), chunk.samples
        cut = tree.cuttable(n, names)
        leaves = [x for x, yes in zip(tree.leaves, cut, strict=True) if yes and isinstance(x, Tensor)]
        free = [x for x in leaves if x.requires_grad]
        generator = torch.Generator().manual_seed(0)
        probes = [torch.randn(x.shape, generator=generator).to(x) for x in free]
        products = [(i, product) for i, product in enumerate(recorder.products) if product.edge is not None]
        by_position = dict.fromkeys(range(len(recorder.products)), False)
        unordered = set()
        if free and products:
            edges: list[Any] = [product.edge for _, product in products]
            own = _numbers(n, free[0])
            weighted = [p * own.to(p).reshape(-1, *[1] * (p.dim() - 1)) for p in probes]
            both = [
                torch.autograd.grad(free, edges, vectors, allow_unused=True, retain_graph=True)
                for vectors in (probes, weighted)
            ]
            for (i, product), plain, scaled in zip(products, *both, strict=True):
                if plain is None or scaled is None:
                    continue
                rows = product.output_rows(plain), product.output_rows(scaled)
                fitting = [order for order in (False, True) if _fits(*rows, own, order)]
                if fitting:
                    by_position[i] = fitting[0]
                else:
                    unordered.add(product.name)
        if not unordered:
            self._by_position[_sequence(recorder, n)] = by_position
        return unordered

    def _compare_last(
        self,
        chunk: Chunk,
        scale: float | Tensor,
        uses: Mapping[str, list[Use]],
        count: int,
        group: int,
    ) -> None:
        """Compare the last gradient with the one of its samples alone, by autograd."""
        last = chunk.part((count - 1) * group, chunk.samples)
        weights = {name: weight.detach().requires_grad_() for name, weight in self._weights.items()}
        with torch.enable_grad():
            outputs = call(self._model, weights, last.inputs)
        tensors, by_outputs = self._by_outputs(OutputTree(outputs), last.targets, group, group)
        own = float(scale[-1]) if isinstance(scale, Tensor) else scale
        expected: Sequence[Tensor | None] = [None] * len(weights)
        if tensors:
            expected = torch.autograd.grad(tensors, list(weights.values()), by_outputs, allow_unused=True)
        eps = max(epsilon(x) for x in weights.values())
        for (name, weight), gradient in zip(weights.items(), expected, strict=True):
            shape = self._matrix_shape(name)
            mine = (
                GradientFactors(uses[name], shape, weight.detach(), count, group).part(count - 1, count).gradients()[0]
            )
            bound = sum(_bound(use, count, group) for use in uses[name])
            orientation = self._orientations.get(name) or Orientation.of(weight.shape)
            theirs = torch.zeros_like(weight) if gradient is None else own * gradient
            if differ(mine, orientation.to_matrix(theirs).reshape(shape), tolerance(eps), 16 * eps * bound):
                raise NoFactors(f"gradients of {name} are others for a single sample: samples influence each other")


def _bound(use: Use, count: int, group: int) -> float:
    """What the norm of the last gradient is at most."""
    x, d = use.rows(count - 1, count, group)
    return float((x.norm(dim=-1) * d.norm(dim=-1)).sum())


def _sequence(recorder: ProductRecorder, samples: int) -> tuple[Signature, tuple[float, ...]]:
    """The sequence of products, and how many rows each has for a sample."""
    return recorder.signature, tuple(product.uses / samples for product in recorder.products)


def _numbers(samples: int, like: Tensor) -> Tensor:
    """A number of its own for each sample."""
    return 1 + torch.arange(samples, device=like.device) / samples


def _fits(rows: Tensor, scaled: Tensor, own: Tensor, by_position: bool) -> bool:
    """Whether rows [groups, n, size], scaled by their sample's number, lie in this order: see `Use`."""
    length, rest = divmod(rows.shape[1], len(own))
    if rest:
        return False
    share = tolerance(torch.finfo(rows.dtype).eps)
    norms = rows.double().norm(dim=-1)
    numbers = own.repeat(length) if by_position else own.repeat_interleave(length)
    errors = (scaled.double() - numbers.double()[:, None] * rows.double()).norm(dim=-1)
    return bool((errors <= share * norms).all())


Compute = Callable[[], Tensor]


class LazyGradients(Mapping[str, Tensor]):
    """Name -> gradients, each computed when it is asked for and not kept: those of one parameter at a time."""

    def __init__(self, compute: Mapping[str, Compute]) -> None:
        self._compute = dict(compute)

    def __getitem__(self, name: str) -> Tensor:
        return self._compute[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._compute)

    def __len__(self) -> int:
        return len(self._compute)
