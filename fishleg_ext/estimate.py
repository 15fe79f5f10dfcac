"""A curvature model of a network as it is now: observed on its data, in parts that fit into memory."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from fishleg_ext.curvature import Curvature
from fishleg_ext.observation.batches import require_rereadable
from fishleg_ext.observation.gradients import gradient_bytes
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction, label_sampler
from fishleg_ext.observation.observe import CHUNK_BYTES, observe
from fishleg_ext.sparsity.masks import Masks, pack_masks


class Stopwatch:
    """Seconds that each stage took, all its times added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time this block."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Source(NamedTuple):
    """What an estimate is made from."""

    data: Iterable[Any]
    loss_fn: LossFunction
    num_grads: int
    seed: int


class Estimate:
    """Curvature of some weights, of all at once or, where memory or the model demands it, of one group at a time.

    Args:
        model: any module.
        weights: name -> parameter of the model.
        biases: name of a weight -> of the bias of its layer.
        curvature: what is estimated.
        num_grads, grad_batch_size, labels, likelihood, progress: see `observe`; None is the curvature's default.
        max_memory: bytes for the curvature, its workspace and its gradients; None is all at once.
        sharing: how many estimates are held at a time, each with an equal part of max_memory.
        timed: times the observation, as this stage.
        stage: its name.

    Attributes:
        groups: names of the parameters that are estimated together.
        held: the group whose curvature is there.
        used_grads: gradients in it.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        biases: Mapping[str, str],
        curvature: Curvature,
        *,
        num_grads: Optional[int],
        grad_batch_size: int,
        labels: Optional[str],
        likelihood: Optional[Likelihood],
        max_memory: Optional[int],
        sharing: int,
        progress: bool,
        timed: Stopwatch,
        stage: str,
    ) -> None:
        self.model, self._parameters, self.curvature = model, weights, curvature
        self.num_grads = curvature.default_num_grads if num_grads is None else num_grads
        self.grad_batch_size = grad_batch_size
        self.labels = curvature.default_labels if labels is None else labels
        self.likelihood, self._given_memory, self._sharing = likelihood, max_memory, sharing
        self.max_memory = None if max_memory is None else max_memory // sharing
        self.progress, self._timed, self._stage = progress, timed, stage
        curvature.progress = progress
        curvature.biases = dict(biases) if curvature.takes_biases else {}
        curvature.check(weights)
        self.groups = self._split()
        self.held: list[str] = []
        self.used_grads = 0
        self._source: Optional[Source] = None
        self._masks: dict[str, Tensor] = {}

    @property
    def carries_over(self) -> bool:
        """Whether the next estimate begins from this one: where parameters are split, none is there when it ends."""
        return bool(self.curvature.carry_over) and len(self.groups) == 1

    @property
    def samples(self) -> int:
        """How many the last estimate was to be made from."""
        num_grads = self.num_grads if self._source is None else self._source.num_grads
        return num_grads * self.grad_batch_size

    @property
    def ready(self) -> bool:
        """Whether there is curvature, or data to estimate it on."""
        return bool(self._source or self.held)

    def begin(
        self,
        data: Optional[Iterable[Any]],
        loss_fn: LossFunction,
        masks: Mapping[str, Tensor],
        *,
        num_grads: Optional[int] = None,
        seed: int = 0,
    ) -> None:
        """Forget what was, and estimate at once what needs no second pass over the data.

        Args:
            data, loss_fn, seed: see `observe`.
            masks: name -> bool tensor, True = alive.
            num_grads: fewer than usual.
        """
        self.release()
        label_sampler(self.labels, loss_fn, self.likelihood)
        if self.curvature.observes:
            if data is None:
                raise ValueError(
                    f"{type(self.curvature).__name__} needs data, given to the Pruner or to estimate, got None"
                )
            if len(self.groups) > 1:
                why = "inputs='sequential'" if self.curvature.sequential else "max_memory"
                require_rereadable(data, f"{why} splits the parameters over several passes")
            if self.curvature.passes > 1:
                require_rereadable(data, f"{type(self.curvature).__name__} learns in {self.curvature.passes} passes")
        source = Source(() if data is None else data, loss_fn, num_grads or self.num_grads, seed)
        self._masks = dict(masks)
        if len(self.groups) == 1:
            self._observe(self.groups[0], source)
        self._source = source

    def hold(self, names: list[str]) -> None:
        """Estimate the curvature of this group, unless it is there."""
        if self.held != names:
            assert self._source is not None
            self._observe(names, self._source)

    def release(self) -> None:
        """Forget the curvature, but what the next estimate begins from, and the data."""
        self._source, self.held = None, []
        if not self.carries_over:
            self.curvature.start({})

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name -> the weights as they are now."""
        return {name: self._parameters[name].detach() for name in names}

    def biases(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name of the weight -> its layer's bias as it is now, of those that the curvature knows."""
        return {name: p.detach() for name, p in self._bias_parameters(names).items()}

    def knows_as_dead(self, masks: Mapping[str, Tensor]) -> bool:
        """Whether the inverse is that of the weights alive under these masks."""
        if not self.curvature.masked:
            return all(bool(mask.all()) for mask in masks.values())
        return all(torch.equal(mask, masks[name]) for name, mask in self._masks.items())

    def state_dict(self) -> dict[str, Any]:
        """The curvature, if it is held."""
        return {
            "held": list(self.held),
            "used_grads": self.used_grads if self.held else 0,
            "masks_at_estimate": pack_masks(self._masks) if self.held else {},
            "model": type(self.curvature).__name__,
            "curvature": self.curvature.state_dict() if self.held else {},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; ValueError where the state is of something else."""
        masks = Masks(self._parameters)
        if state["model"] != (model := type(self.curvature).__name__):
            raise ValueError(f"expected the state of {model}, got that of {state['model']}")
        if state["held"]:
            if list(state["held"]) != list(self._parameters):
                raise ValueError(f"expected curvature of {list(self._parameters)}, got that of {list(state['held'])}")
            masks.load_state_dict(state["masks_at_estimate"])
            self.curvature.start(self.weights(self._parameters))
            self.curvature.load_state_dict(state["curvature"])
        else:
            self.curvature.start({})
        self._masks, self.held, self._source = dict(masks), list(state["held"]), None
        self.used_grads = int(state["used_grads"])

    def _observe(self, names: list[str], source: Source) -> None:
        self.held = []
        observed = {name: self._parameters[name] for name in names}
        if "gradients" in self.curvature.observes:
            observed |= {self.curvature.biases[name]: bias for name, bias in self._bias_parameters(names).items()}
        with self._timed(self._stage):
            if not self.carries_over:
                self.curvature.start({})  # before there is memory for what is next
            self.curvature.start(self.weights(names))
            for number in range(self.curvature.passes if self.curvature.observes else 0):
                self.used_grads = observe(
                    self.model,
                    source.data,
                    source.loss_fn,
                    self.curvature,
                    observed,
                    masks={name: self._masks[name] for name in names} if self.curvature.masked else None,
                    num_grads=source.num_grads,
                    grad_batch_size=self.grad_batch_size,
                    labels=self.labels,
                    likelihood=self.likelihood,
                    seed=source.seed + number,  # other labels in each pass
                    chunk_bytes=self._chunk_bytes(names),
                    progress=self.progress,
                )
        self.held = names

    def _bias_parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        biases = self.curvature.biases
        return {name: self.model.get_parameter(biases[name]) for name in names if name in biases}

    def _split(self) -> list[list[str]]:
        """Groups of parameters whose curvature fits into max_memory at a time, with the workspace it needs."""
        if self.max_memory is None and not self.curvature.sequential:
            return [list(self._parameters)]
        most = float("inf") if self.max_memory is None else self.max_memory
        parts = [[name] for name in self._parameters] if self.curvature.separable else [list(self._parameters)]
        largest = max(parts, key=self._bytes_of)
        if (needed := self._bytes_of(largest)) > most:
            what = "all parameters together need" if len(largest) > 1 else f"{largest[0]} needs"
            raise ValueError(
                f"max_memory={self._given_memory} is too small for {type(self.curvature).__name__}: "
                f"{what} at least {needed * self._sharing} bytes"
                + (", half of them for allocation=" if self._sharing > 1 else "")
            )
        groups = [parts[0]]
        for part in parts[1:]:
            if self.curvature.sequential or self._bytes_of(groups[-1] + part) > most:
                groups.append([])
            groups[-1].extend(part)
        return groups

    def _bytes_of(self, names: list[str], num_gradients: int = 1) -> int:
        """State of these parameters, the largest workspace that one of them needs, and some gradients."""
        weights = [(name, self._parameters[name], self.num_grads) for name in names]
        held = sum(self.curvature.state_bytes(*weight) for weight in weights)
        workspace = max(self.curvature.workspace_bytes(*weight) for weight in weights)
        gradients = gradient_bytes(self._parameters[name] for name in names) if self.curvature.observes else 0
        return held + workspace + num_gradients * gradients

    def _chunk_bytes(self, names: list[str]) -> int:
        """Memory for gradients of these parameters: for as many at a time in every group, as labels are drawn so."""
        if self.max_memory is None:
            return CHUNK_BYTES
        room = [min(CHUNK_BYTES, self.max_memory - self._bytes_of(group, 0)) for group in self.groups]
        one = [gradient_bytes(self.weights(group).values()) for group in self.groups]
        most = min(left // gradient for left, gradient in zip(room, one, strict=True))
        return most * gradient_bytes(self.weights(names).values())
