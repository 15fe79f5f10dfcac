"""Gradients of labels that a model draws itself, on the inputs of the forward pass that the user made."""

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext.common.orientation import Orientation
from fishleg_ext.observation.batches import Chunk, one_chunk
from fishleg_ext.observation.batchnorm import statistics_of
from fishleg_ext.observation.forward import running
from fishleg_ext.observation.gradient_factors import GradientFactors
from fishleg_ext.observation.gradients import GradientObserver
from fishleg_ext.observation.types import Observation
from fishleg_ext.optim.forward import Called
from fishleg_ext.optim.labels import Labels

# Memory for gradients that have no factors: at a time, and in all; samples beyond that are left out.
CHUNK_BYTES, HELD_BYTES = 2**27, 2**29
# Gradients by parameters that are no matrices: each of as many samples, so that few are computed.
GROUPS = 8


@dataclass(frozen=True)
class Drawn:
    """Gradients of drawn labels, of some samples.

    Attributes:
        observations: gradients of each sample by weights and by biases that go with them.
        groups: name of another parameter -> gradients [count, *shape] of groups of samples, whose mean square is the
            diagonal of F.
    """

    observations: Sequence[Observation]
    groups: Mapping[str, Tensor]


class DrawnGradients:
    """Observes gradients of drawn labels on the inputs of the user's own forward pass.

    Args:
        model: any module; its samples must not influence each other, but by BatchNorm.
        weights: name -> parameter, of those with a gradient of each sample, biases of their products among them.
        others: name -> parameter, of those with a gradient of each of `GROUPS` groups of samples.
        orientations: name of a weight -> how it is seen as a matrix.
        biases: name of a weight -> name of the bias that is added to its products.
        labels: of the loss that is minimised.
        bytes_of: memory of one gradient of a weight, see `GradientObserver`.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        others: Mapping[str, nn.Parameter],
        orientations: Mapping[str, Orientation],
        biases: Mapping[str, str],
        labels: Labels,
        bytes_of: Callable[[str, GradientFactors], int],
    ) -> None:
        self.model, self._others, self._labels = model, list(others), labels
        self._device = labels.generator.device
        self._most = sys.maxsize  # samples of which memory is there for the gradients
        tensors = {weight: (bias, weights[bias]) for weight, bias in biases.items()}
        self._weights, self._biases = weights, tensors
        loss = labels.loss
        each = GradientObserver(model, loss, weights, {}, labels, orientations, tensors, CHUNK_BYTES, bytes_of)
        in_groups = GradientObserver(model, loss, others, {}, labels, {}, {}, CHUNK_BYTES)
        self._each, self._in_groups = each if weights else None, in_groups if others else None

    def observe(self, called: Called, samples: int, measured: int, seed: int) -> tuple[Drawn, Drawn]:
        """Run the model on the first and on the last of the samples that it was called with.

        Its modules are in the mode that they have, so that dropout drops, but for BatchNorm, which has the statistics
        of these samples as constants. That is one pass; one more of the first and of the last for parameters that are
        no matrices, and one for these statistics. Labels of both are drawn by themselves, also of samples that are
        among both.

        Args:
            called: positional and keyword arguments.
            samples, measured: how many at most, of the first and of the last. Of a small batch the first are those that
                are not the last, or as many as these. Fewer where gradients without factors would take more than
                `HELD_BYTES`.
            seed: of the labels.

        Returns:
            what was drawn for the first, and for the last.

        Raises:
            TypeError, ValueError: the arguments are no batch of samples, or gradients are not finite.
        """
        chunk = self._chunk(called)
        while (drawn := self._observe(chunk, samples, measured, seed)) is None:
            pass  # of fewer samples
        return drawn

    def _observe(self, chunk: Chunk, samples: int, measured: int, seed: int) -> tuple[Drawn, Drawn] | None:
        """Observe; or find out that memory is for fewer samples, and return None."""
        n, most = chunk.samples, self._most
        last = min(measured, n, most // 2)
        first = min(samples, max(n - last, min(n, measured)), max(1, most - last))
        ends = chunk.part(0, first), chunk.part(n - last, n)
        both = chunk if first + last == n else ends[0].joined(ends[1])
        by = chunk if first + last >= n else both
        trained = [module for module in self.model.modules() if module.training]
        normalised = [module for module in trained if isinstance(module, nn.modules.batchnorm._BatchNorm)]
        trained = [module for module in trained if not isinstance(module, nn.modules.batchnorm._BatchNorm)]
        self._labels.generator.manual_seed(seed)
        of_model = 2**63 - 1 - seed  # whose random numbers must not be those of the labels
        parts: tuple[list[Observation], list[Observation]] = [], []
        groups: list[dict[str, Tensor]] = [{}, {}]
        with running(self.model, self._device, of_model), statistics_of(self.model, normalised, by, trained):
            if self._each is not None:
                seen = 0
                for observation in self._each.gradients(both, both.samples, cut=first, trained=trained):
                    fits = max(2, HELD_BYTES // max(1, self._held(observation)))
                    if fits < both.samples and fits < self._most:
                        self._most = fits
                        return None
                    parts[seen >= first].append(observation)
                    seen += observation.count
                self._each.check()
            if self._in_groups is not None:
                groups = [self._of_groups(self._in_groups, end, trained) for end in ends]
        return Drawn(parts[0], groups[0]), Drawn(parts[1], groups[1])

    def _of_groups(self, observer: GradientObserver, chunk: Chunk, trained: Sequence[nn.Module]) -> dict[str, Tensor]:
        count = min(GROUPS, chunk.samples)
        chunk = chunk.part(0, chunk.samples // count * count)
        found = [observation.gradients for observation in observer.gradients(chunk, count, trained=trained)]
        groups = {name: torch.cat([part[name] for part in found]) for name in self._others}
        observer.check()
        return groups

    def _held(self, observation: Observation) -> int:
        """Count the bytes of one gradient by what has no factors."""
        known = {bias for name, (bias, _) in self._biases.items() if name in observation.gradient_factors}
        known |= observation.gradient_factors.keys()
        return sum(w.numel() * w.element_size() for name, w in self._weights.items() if name not in known)

    def _chunk(self, called: Called) -> Chunk:
        args, kwargs = called
        named = self._named(args, kwargs)
        try:
            chunk = one_chunk(named if kwargs else args, named.get("labels"))
        except (TypeError, ValueError) as error:
            reason, *_ = str(error).split(";")
            raise type(error)(f"the model was called with what is no batch of samples: {reason}") from None
        if not chunk.samples:
            raise ValueError("expected the model to have been called with samples, got an empty batch")
        return chunk

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by name.

        Raises:
            TypeError: some by position, which have no names, come with others by name.
        """
        model = getattr(self.model, "_orig_mod", self.model)  # of a compiled one
        signature = inspect.signature(model.forward)
        unnamed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL)
        found = dict(signature.bind_partial(*args, **kwargs).arguments)
        for name, parameter in signature.parameters.items():
            if name in found and parameter.kind is inspect.Parameter.VAR_KEYWORD:
                found |= found.pop(name)
            elif name in found and parameter.kind in unnamed and kwargs:
                raise TypeError(
                    f"expected {type(model).__name__} to be called with arguments by position alone, or all with "
                    f"names, got some by position that are {name!r} in its forward, and others by name"
                )
        return found
