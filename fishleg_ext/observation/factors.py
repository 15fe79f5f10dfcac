"""Observes gradients in factors, by one forward and one backward pass of many samples.

Which row of X and D is whose is measured: a second backward pass, with the losses weighted by a number of its own for
each sample, scales each row of D by that of its sample, whatever the shape in which a layer was called. Some samples
are enough, once for each sequence of products and number of rows; where the first dimension of the inputs is not the
sample, so that data may route rows elsewhere, it is done in every batch.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.common.waiting import read
from fishleg_ext.observation.batches import Chunk
from fishleg_ext.observation.forward import call, training
from fishleg_ext.observation.gradient_factors import GradientFactors, Use
from fishleg_ext.observation.likelihoods import LossFunction, OwnLoss
from fishleg_ext.observation.outputs import CannotCut, OutputTree, SampleLosses, times_own
from fishleg_ext.observation.recorder import ProductRecorder
from fishleg_ext.observation.types import DrawLabels
from fishleg_ext.observation.verification import (
    VERIFIED_SAMPLES,
    Comparisons,
    NotProducts,
    Signature,
    Verifier,
    differ,
    epsilon,
    largest_norm,
    tolerance,
)


class NoFactors(Exception):
    """The gradients of these samples have no factors; the message says why.

    Attributes:
        drawn: targets and scale, where these were drawn before that was found.
    """

    drawn: tuple[Any, float | Tensor] | None = None


class FactorObserver:
    """Computes gradients in factors, by one forward and one backward pass of many samples.

    Samples must not influence each other, and weights enter by products alone: `verification` says so of each sequence
    of products, for the first, second, fourth, eighth ... number of rows that it has, as samples are longer or shorter.
    The last sample of a batch is compared with it alone, for each other number of rows, and in a number of batches that
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
        self._unverified = False  # whether this batch is one whose number of rows was not verified

    def factors(
        self, chunk: Chunk, count: int, trained: Sequence[nn.Module] = ()
    ) -> tuple[dict[str, GradientFactors], Any, float | Tensor]:
        """Compute the factors of `count` gradients, each of as many of the samples.

        Args:
            chunk: the samples.
            count: how many gradients.
            trained: modules that are in training mode meanwhile, where they may be random. What is verified is so in
                eval mode, and in this the gradients are where training has other products, as of layers left out.

        Returns:
            name of a weight, of those that have any -> factors; the targets, which may have been drawn; and what
            gradients of others are to be multiplied by, as of `LabelSampler.draw`.

        Raises:
            NoFactors: samples influence each other, or the loss cannot be cut into theirs, or no weight enters by
                products alone.
        """
        if chunk.samples == 1 or not chunk.divisible:
            raise NoFactors("a single sample")
        self._unverified = False
        recorder, outputs, trained = self._known_pass(chunk, trained)
        tree, targets = OutputTree(outputs), chunk.targets
        if isinstance(self._losses.loss_fn, OwnLoss) and not self._losses.loss_fn.agrees(outputs, targets):
            raise NoFactors("the loss that the model returns is another than of the first samples")
        scale: float | Tensor = 1.0
        if self._draw is not None:
            targets, scale = self._draw(tree.detached(), targets, chunk.samples, count)
        self._batches += 1
        compared = self._unverified or self._batches & (self._batches - 1) == 0  # 1, 2, 4, ...
        given = chunk.with_targets(targets)
        try:
            if compared and trained:
                self._compare_some(given, scale, count)
            with training(trained):  # as checkpoints run parts of the model again
                found = self._of_drawn(recorder, tree, given, scale, count, compared=compared and not trained)
            return found, targets, scale
        except NoFactors as reason:
            reason.drawn = targets, scale
            raise

    def _known_pass(
        self, chunk: Chunk, trained: Sequence[nn.Module]
    ) -> tuple[ProductRecorder, Any, Sequence[nn.Module]]:
        """Run the model, in training mode where its products are then those that were verified, else in eval mode."""
        modes = [trained, ()] if trained else [()]
        for verified in (False, True):
            for mode in modes:
                recorder, outputs = self._forward(chunk, mode)
                if self._is_known(recorder, chunk):
                    return recorder, outputs, mode
            if not verified:
                names = set(self._weights)
                self._verify(chunk, recorder.signature)
                if not trained and names == set(self._weights) and self._is_known(recorder, chunk):
                    return recorder, outputs, trained
        raise NoFactors("the sequence of products is another for some of the samples")

    def _is_known(self, recorder: ProductRecorder, chunk: Chunk) -> bool:
        return _sequence(recorder, chunk.samples) in self._by_position

    def _compare_some(self, chunk: Chunk, scale: float | Tensor, count: int) -> None:
        """Compare the last gradient in eval mode, where nothing is random, among a few."""
        few, group = min(count, VERIFIED_SAMPLES), chunk.samples // count
        part = chunk.part((count - few) * group, chunk.samples)
        recorder, outputs = self._forward(part)
        if part.samples > 1 and self._is_known(recorder, part):
            own = scale[-few:] if isinstance(scale, Tensor) else scale
            self._of_drawn(recorder, OutputTree(outputs), part, own, few, compared=True)

    def _of_drawn(
        self,
        recorder: ProductRecorder,
        tree: OutputTree,
        chunk: Chunk,
        scale: float | Tensor,
        count: int,
        *,
        compared: bool,
    ) -> dict[str, GradientFactors]:
        """Compute the factors for these targets, and compare the last gradient with that of its samples alone."""
        group = chunk.samples // count
        free, by_outputs = self._by_outputs(tree, chunk.targets, chunk.samples, group)
        if isinstance(scale, Tensor):
            own = scale.repeat_interleave(group)
            by_outputs = times_own(by_outputs, own)
        elif scale != 1:
            by_outputs = [g * scale for g in by_outputs]
        uses = self._uses(recorder, free, by_outputs, chunk.samples)
        if compared:
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
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # what is wrong with the loss itself is raised where it is called without this
            raise NoFactors(f"the loss of some samples cannot be computed: {error}") from error

    def _matrix_shape(self, name: str) -> tuple[int, int]:
        weight = self._weights[name]
        shape = self._orientations[name].matrix_shape if name in self._orientations else weight.shape
        return shape[0], weight.numel() // max(1, shape[0])

    def _forward(self, chunk: Chunk, trained: Sequence[nn.Module] = ()) -> tuple[ProductRecorder, Any]:
        weights = {name: weight.detach().requires_grad_() for name, weight in self._weights.items()}
        recorder = ProductRecorder(weights, self._orientations)
        try:
            with torch.enable_grad(), recorder, training(trained):
                outputs = call(self._model, weights, chunk.inputs)
        except torch.OutOfMemoryError:
            raise
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
            weighted = times_own(by_outputs, own)
            edges = [made[i].product.edge for i in unsure]
            different = Comparisons()
            for i, scaled in zip(unsure, torch.autograd.grad(outputs, edges, weighted, allow_unused=True), strict=True):
                use, rows = made[i], made[i].product.output_rows
                fits = scaled is not None and _fits(rows(use.gradient), rows(scaled), own, use.by_position)
                what = f"rows of {use.product.name} belong to other samples than in the first batch"
                different.add(~torch.as_tensor(fits), what)
            if why_not := different.first():
                raise NoFactors(why_not)
        return uses

    def _verify(self, chunk: Chunk, signature: Signature) -> None:
        """Verify a new sequence of products; weights that enter in other ways are dropped.

        Of most numbers of rows of one sequence it is only measured whose they are, and the last sample compared.
        """
        part = chunk.part(0, min(VERIFIED_SAMPLES, chunk.samples))
        recorder, _ = self._forward(part)
        if recorder.signature != signature:  # which not all samples have
            part = chunk
        looked_up = {lookup.name for lookup in recorder.lookups}
        products = {product.name for product in recorder.products}
        for name in list(self._weights):
            if name in recorder.others or name in looked_up or name not in products:
                self._drop(name)
        known = sum(own == signature for own, _ in self._by_position)
        if known & (known + 1) and self._verifier and not self._measure_rows(part, self._verifier.names):
            self._unverified = True
            return
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
            weighted = times_own(probes, own)
            both = [
                torch.autograd.grad(free, edges, vectors, allow_unused=True, retain_graph=True)
                for vectors in (probes, weighted)
            ]
            fits: dict[tuple[int, bool], Tensor] = {}
            for (i, product), plain, scaled in zip(products, *both, strict=True):
                if plain is None or scaled is None:
                    continue
                rows = product.output_rows(plain), product.output_rows(scaled)
                fits |= {(i, order): _fits(*rows, own, order) for order in (False, True)}
            fitting = {key for key, yes in zip(fits, read(fits.values()), strict=True) if yes}
            for i in {i for i, _ in fits}:
                by_position[i] = (i, False) not in fitting
                if by_position[i] and (i, True) not in fitting:
                    unordered.add(recorder.products[i].name)
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
        own = scale[-1] if isinstance(scale, Tensor) else scale
        expected: Sequence[Tensor | None] = [None] * len(weights)
        if tensors:
            expected = torch.autograd.grad(tensors, list(weights.values()), by_outputs, allow_unused=True)
        eps = max(epsilon(x) for x in [*weights.values(), *(use.gradient for of in uses.values() for use in of)])
        noise = 16 * eps * largest_norm(expected) * torch.as_tensor(own).abs()
        found = Comparisons()
        for (name, weight), gradient in zip(weights.items(), expected, strict=True):
            shape = self._matrix_shape(name)
            factors = GradientFactors(uses[name], shape, weight.detach(), count, group)
            mine = factors.part(count - 1, count).gradients()[0]
            bound = sum((_bound(use, count, group) for use in uses[name]), mine.new_zeros((), dtype=torch.float64))
            orientation = self._orientations.get(name) or Orientation.of(weight.shape)
            theirs = torch.zeros_like(weight) if gradient is None else gradient * torch.as_tensor(own).to(gradient)
            found.add(
                differ(mine, orientation.to_matrix(theirs).reshape(shape), tolerance(eps), 16 * eps * bound + noise),
                f"gradients of {name} are others for a single sample: samples influence each other",
            )
        if why_not := found.first():
            raise NoFactors(why_not)


def _bound(use: Use, count: int, group: int) -> Tensor:
    """Bound the norm of the last gradient."""
    x, d = use.rows(count - 1, count, group)
    return (x.norm(dim=-1) * d.norm(dim=-1)).sum(dtype=torch.float64)


def _sequence(recorder: ProductRecorder, samples: int) -> tuple[Signature, tuple[float, ...]]:
    """The sequence of products, and how many rows each has for a sample."""
    return recorder.signature, tuple(product.uses / samples for product in recorder.products)


def _numbers(samples: int, like: Tensor) -> Tensor:
    """A number of its own for each sample."""
    return 1 + torch.arange(samples, device=like.device) / samples


def _fits(rows: Tensor, scaled: Tensor, own: Tensor, by_position: bool) -> Tensor:
    """Tell whether rows [groups, n, size], scaled by their sample's number, lie in this order: see `Use`."""
    length, rest = divmod(rows.shape[1], len(own))
    if rest:
        return torch.zeros((), dtype=torch.bool, device=rows.device)
    eps = torch.finfo(rows.dtype).eps
    norms = rows.double().norm(dim=-1)
    if not norms.numel():
        return torch.ones((), dtype=torch.bool, device=rows.device)
    # All that some rows are, such as those of the query of a first token, which has nothing to choose from.
    noise = 16 * eps * norms.max()
    numbers = own.repeat(length) if by_position else own.repeat_interleave(length)
    errors = (scaled.double() - numbers.double()[:, None] * rows.double()).norm(dim=-1)
    return (errors <= tolerance(eps) * norms + noise).all()
