"""Gradients of labels that a model draws itself, on the inputs of the forward pass that the user made."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk, one_chunk
from fishleg_ext.observation.forward import running
from fishleg_ext.observation.gradients import GradientObserver
from fishleg_ext.observation.likelihoods import (
    LIKELIHOODS,
    Likelihood,
    LossFunction,
    checked_likelihood,
    label_sampler,
    sample_loss,
)
from fishleg_ext.observation.types import Observation

# Memory for gradients that have no factors, at a time.
CHUNK_BYTES = 2**28


def _next_token(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].movedim(-1, 1), targets[:, 1:])


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "categorical": F.cross_entropy,
    "tokens": lambda logits, targets: F.cross_entropy(logits.movedim(-1, 1), targets),
    "next_token": _next_token,
    "gaussian": F.mse_loss,
    "bernoulli": F.binary_cross_entropy_with_logits,
}


def checked_loss(likelihood: Likelihood | None, loss_fn: LossFunction | None) -> tuple[Likelihood, LossFunction]:
    """Return the likelihood, and its loss where none is given.

    Raises:
        ValueError: there is no likelihood, it is unknown, or it is a function without a loss.
    """
    if likelihood is None:
        raise ValueError(
            f"expected likelihood=, which labels for the curvature are drawn from: {', '.join(map(repr, LIKELIHOODS))} "
            "or a function (outputs, generator) -> targets"
        )
    checked_likelihood("likelihood", likelihood)
    if loss_fn is None:
        if not isinstance(likelihood, str):
            raise ValueError("expected loss_fn=, the loss that is minimised, beside a likelihood that is a function")
        named = LOSSES[likelihood]
        loss_fn = lambda outputs, targets: named(getattr(outputs, "logits", outputs), targets)
    return likelihood, loss_fn


Called = tuple[tuple[Any, ...], dict[str, Any]]


class LastInputs:
    """Keeps what a model was last called with while gradients were recorded.

    A hook of the model; copies of the model have one that keeps nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        self.called: Called | None = None
        self.paused = False
        self.handle = model.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled() and not self.paused:
            self.called = args, kwargs

    def __getstate__(self) -> dict[str, Any]:
        return {"called": None, "paused": True, "handle": None}


@dataclass(frozen=True)
class Drawn:
    """Gradients of drawn labels, of some samples.

    Attributes:
        observations: gradients of each sample by weights and by biases that go with them.
        together: name of another parameter -> one gradient of all samples, whose mean square is the diagonal of F.
    """

    observations: Sequence[Observation]
    together: Mapping[str, Tensor]


class DrawnGradients:
    """Observes gradients of drawn labels on the inputs of the user's own forward pass.

    Args:
        model: any module; its samples must not influence each other in eval mode.
        weights: name -> parameter, of those with a gradient of each sample, biases of their products among them.
        others: name -> parameter, of those with one gradient of all samples together.
        orientations: name of a weight -> how it is seen as a matrix.
        biases: name of a weight -> name of the bias that is added to its products.
        likelihood, loss_fn: see `checked_loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        orientations: Mapping[str, Orientation],
        biases: Mapping[str, str],
        likelihood: Likelihood,
        loss_fn: LossFunction,
    ) -> None:
        self.model, self._others = model, list(others)
        self._device = next(iter([*weights.values(), *others.values()])).device
        self._sampler = label_sampler("model", loss_fn, likelihood)
        self._loss_fn = sample_loss(loss_fn)
        self._generator = torch.Generator(self._device)
        self._checked = False
        tensors = {weight: (bias, weights[bias]) for weight, bias in biases.items()}
        each = GradientObserver(model, self._loss_fn, weights, {}, self._draw, orientations, tensors, CHUNK_BYTES)
        together = GradientObserver(model, self._loss_fn, others, {}, self._draw, {}, {}, CHUNK_BYTES)
        self._each, self._together = each if weights else None, together if others else None

    def observe(self, called: Called, samples: int, seed: int) -> Drawn:
        """Run the model in eval mode on some of what it was called with, and draw labels.

        Args:
            called: positional and keyword arguments.
            samples: how many at most.
            seed: of the labels.

        Raises:
            TypeError, ValueError: the arguments are no batch of samples, or gradients are not finite.
        """
        chunk = self._chunk(called)
        chunk = chunk.part(0, min(samples, chunk.samples))
        self._generator.manual_seed(seed)
        parts: list[Observation] = []
        together: dict[str, Tensor] = {}
        with running(self.model, self._device, seed):
            if self._each is not None:
                parts = list(self._each.gradients(chunk, chunk.samples))
                self._each.check()
            if self._together is not None:
                found = next(iter(self._together.gradients(chunk, 1))).gradients
                together = {name: found[name][0] for name in self._others}
                self._together.check()
        return Drawn(parts, together)

    def _draw(self, outputs: Any, targets: Any, samples: int, count: int) -> tuple[Any, float | Tensor]:
        assert self._sampler is not None
        assert self._loss_fn is not None
        drawn = self._sampler.draw(self._generator, outputs, targets, samples, count)
        if not self._checked:
            self._checked = True
            self._sampler.check(self._loss_fn, outputs, drawn[0])
        return drawn

    def _chunk(self, called: Called) -> Chunk:
        args, kwargs = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, called)
        inputs: Any = args
        if kwargs:
            inputs = {**inspect.signature(self.model.forward).bind_partial(*args).arguments, **kwargs}
        return one_chunk(inputs, kwargs.get("labels"))
