"""Observes the inputs of products with weights, and the gradients of each sample's loss by their outputs."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk, tokens_of
from fishleg_ext.observation.finite import Finite
from fishleg_ext.observation.forward import call
from fishleg_ext.observation.likelihoods import LossFunction, OwnLoss
from fishleg_ext.observation.outputs import CannotCut, OutputTree, SampleLosses
from fishleg_ext.observation.products import ROW_BYTES, Product
from fishleg_ext.observation.recorder import ProductRecorder
from fishleg_ext.observation.types import DrawLabels, Observation, Observer, ProductRows
from fishleg_ext.observation.verification import VERIFIED_SAMPLES, Signature, Verifier


class LayerObserver:
    """Hands over inputs and output gradients, product by product.

    Samples go through the model together where verification shows that they do not influence each other, and that the
    loss can be cut into theirs; else one by one.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction | None,
        weights: Mapping[str, nn.Parameter],
        observer: Observer,
        draw: DrawLabels | None,
        chunk_bytes: int,
        orientations: Mapping[str, Orientation],
        biases: Mapping[str, tuple[str, Tensor]],
        keep_outputs: Callable[[Any], None] | None = None,
    ) -> None:
        self.model, self.observer, self.draw, self._keep_outputs = model, observer, draw, keep_outputs
        self.chunk_bytes, self.orientations = chunk_bytes, orientations
        self.weights = {name: weight.detach() for name, weight in weights.items()}
        self.backward = "output_gradients" in observer.observes
        self._seen = Finite()
        self._verifier = Verifier(model, self.weights, orientations, biases)
        self._verified: set[tuple[bool, Signature]] = set()  # with several samples together, or one
        self._losses = SampleLosses(loss_fn)
        self._together: bool | None = None
        self._looked_up: set[str] = set()
        self._tokens: Tensor | None = None  # of the chunk that is observed

    @property
    def any_nonzero(self) -> bool:
        """Tell whether any output gradient so far is not zero, or there was none."""
        return self._seen.any_nonzero

    def check(self) -> None:
        """Raise ValueError where inputs or output gradients had NaN or inf, by name of the parameter."""
        if bad := self._seen.bad():
            raise ValueError(f"the {bad[0]} contain NaN or inf")

    def run(self, chunk: Chunk) -> None:
        """Observe some samples."""
        if self._together is None and chunk.divisible and chunk.samples > 1:
            self._verify(chunk.part(0, min(VERIFIED_SAMPLES, chunk.samples)))
        try:
            if self._together or chunk.samples == 1:
                return self._run(chunk)
        except _NotTogether as reason:
            self._observe_one_by_one(str(reason))
        for s in range(chunk.samples):
            self._run(chunk.part(s, s + 1))

    def _verify(self, chunk: Chunk) -> None:
        signature, why_not = self._verifier.verify(chunk)
        self._verified.add((chunk.samples > 1, signature))
        if chunk.samples > 1:
            self._together = not why_not
            if why_not:
                self._observe_one_by_one(why_not)

    def _observe_one_by_one(self, reason: str) -> None:
        self._together = False
        warnings.warn(
            f"samples are observed one by one, which is slower: {reason}",
            stacklevel=2,
        )

    def _run(self, chunk: Chunk) -> None:
        """A forward pass, and a backward pass if gradients are observed."""
        self._tokens = tokens_of(self.model, chunk.inputs)
        if self._tokens is not None and bool(self._tokens.all()):  # waited for once a chunk
            self._tokens = None
        if self.backward:
            self._run_backward(chunk)
        else:
            recorder = ProductRecorder(self.weights, self.orientations, self._observe_inputs)
            with recorder:
                outputs = call(self.model, self.weights, chunk.inputs)
            if why := self._why_not(recorder, chunk, outputs):
                raise ValueError(
                    f"{why}, in a later batch, though not in the first; expected single samples for this curvature "
                    "model: a loader of batch_size=1 with batch_fn=lambda batch: [batch]"
                )
            if self._keep_outputs is not None:
                self._keep_outputs(outputs)
        self.observer.update(Observation(chunk.samples))

    def _why_not(self, recorder: ProductRecorder, chunk: Chunk, outputs: Any) -> str:
        """Why these samples cannot be observed together; verified anew where the sequence of products is new."""
        for lookup in recorder.lookups:
            if lookup.name not in self._looked_up:
                self._looked_up.add(lookup.name)
                warnings.warn(
                    f"{lookup.name} is looked up as an embedding as well; its inputs are those of its products alone",
                    stacklevel=2,
                )
        together = chunk.samples > 1
        if (together, recorder.signature) not in self._verified:
            signature, why_not = self._verifier.verify(chunk)
            self._verified.add((together, signature))
            return why_not
        return self._verifier.compare_last(chunk, OutputTree(outputs)) if together else ""

    def _run_backward(self, chunk: Chunk) -> None:
        weights = {name: weight.detach().requires_grad_() for name, weight in self.weights.items()}
        recorder = ProductRecorder(weights, self.orientations)
        with torch.enable_grad(), recorder:
            outputs = call(self.model, weights, chunk.inputs)
        if why := self._why_not(recorder, chunk, outputs):
            raise _NotTogether(f"{why}, in a later batch, though not in the first")
        targets, scale = chunk.targets, torch.ones(())
        if isinstance(self._losses.loss_fn, OwnLoss):
            self._losses.loss_fn.check(outputs, targets)
        if self.draw is not None:
            tree = OutputTree(outputs)
            targets, factor = self.draw(tree.detached(), targets, chunk.samples, chunk.samples)
            scale = torch.as_tensor(factor)
            if chunk.own_loss:  # which is computed from the labels among the inputs
                recorder = ProductRecorder(weights, self.orientations)
                with torch.enable_grad(), recorder:
                    outputs = call(self.model, weights, chunk.with_targets(targets).inputs)
        reached = [product for product in recorder.products if product.edge is not None]
        self._losses.names = self._verifier.names
        edges = [product.edge for product in reached if product.edge is not None]
        try:
            gradients = self._losses.gradients_by(edges, outputs, targets, chunk.samples, scale)
        except CannotCut as what:
            raise _NotTogether(f"the loss needs {what}, which cannot be cut into samples") from None
        for product, gradient in zip(reached, gradients, strict=True):
            if gradient is None:
                continue  # the loss does not depend on it, so that its inputs do not count either
            self._observe(product, "output_gradients", gradient)
            if "inputs" in self.observer.observes:
                self._observe_inputs(product)

    def _observe_inputs(self, product: Product) -> None:
        self._observe(product, "inputs", product.inputs)

    def _observe(self, product: Product, what: str, x: Tensor) -> None:
        if not x.numel():
            return
        key = f"{what.replace('_', ' ')} of the layer of {product.name}"
        self._seen.see(key, x, nonzero=what == "output_gradients")
        rows = product.input_rows if what == "inputs" else product.output_rows
        parts = [x]
        if product.divisible:
            per_sample = rows(x[:1]).numel() * x.element_size()
            parts = list(x.split(max(1, min(self.chunk_bytes, ROW_BYTES) // max(1, per_sample))))
        tokens, first = self._tokens_along(x), 0
        for part in parts:
            found = rows(part)
            if tokens is not None:
                kept = tokens[first : (first := first + len(part))].flatten()
                if len(kept) == found.shape[1]:  # a row for each position
                    found = found[:, kept]
            observed: dict[str, Any] = {what: {product.name: ProductRows(found, product.outputs)}}
            self.observer.update(Observation(0, **observed))

    def _tokens_along(self, x: Tensor) -> Tensor | None:
        """Tell which positions of x, [N, T, ...] or [N * T, ...], are no padding; None where all are, or x has none."""
        tokens = self._tokens
        if tokens is None:
            return None
        if x.dim() > 2 and x.shape[:2] == tokens.shape:
            return tokens
        return tokens.flatten() if x.dim() == 2 and len(x) == tokens.numel() > len(tokens) else None


class _NotTogether(Exception):
    """Samples cannot be observed together; the message says why."""
