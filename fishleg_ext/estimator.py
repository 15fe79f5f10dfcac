"""Estimates the curvature of a network as it is now, in groups of parameters that fit into memory."""

import contextlib
import itertools
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fishleg_ext.common.memory import chunk_bytes, free_bytes
from fishleg_ext.common.orientation import Orientation
from fishleg_ext.common.state import state_entry
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature import Curvature, Estimate
from fishleg_ext.observation.batches import CHUNK_SAMPLES, chunks, require_rereadable
from fishleg_ext.observation.blocks import Blocks
from fishleg_ext.observation.forward import running
from fishleg_ext.observation.gradients import gradient_bytes
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction, label_sampler, sample_loss
from fishleg_ext.observation.observe import drawing, known_loss, observe
from fishleg_ext.observation.types import Observation
from fishleg_ext.observation.walk import BlockWalk, linear_loss
from fishleg_ext.sparsity.masks import Masks, pack_masks


class Stopwatch:
    """Seconds that each stage took, all its times added up; what a GPU was given in a stage counts there.

    Args:
        device: what is waited for, if it is a GPU, before a time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Time this block."""
        start = time.perf_counter()
        try:
            yield
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class DataSource(NamedTuple):
    """The data that an estimate is made from."""

    data: Iterable[Any]
    loss_fn: LossFunction | None
    num_grads: int
    seed: int


class _Seen(NamedTuple):
    """Holds what `observe` is given for an estimate."""

    model: nn.Module
    data: Iterable[Any]
    loss_fn: LossFunction | None
    labels: str
    likelihood: Likelihood | None
    keep_outputs: Callable[[Any], None] | None


class Estimator:
    """Makes estimates of a recipe: of all weights at once or, where memory or the recipe demands it, group by group.

    Args:
        model: any module.
        weights: name -> parameter of the model.
        biases: name of a weight -> name of its layer's bias.
        orientations: name of a weight -> how it is seen as a matrix. The curvature sees all weights so, outputs first.
        recipe: what is estimated.
        max_memory: bytes for the curvature, its workspace and its gradients; None is all at once.
        sharing: how many estimates are held at a time, each with an equal part of max_memory.
        progress: whether to show progress bars.
        timed: times the observation, as `stage`.
        stage: its name.
        blocks: that are estimated one by one; None is the network as a whole.
        block_gradients: "outputs" or "loss", which gradients are of.
        offload: whether hidden states are held on the host.

    Attributes:
        groups: names of the parameters that are estimated together.
        held: the group whose curvature is there.
        estimate: the curvature of that group.
        used_grads: gradients in it.
        walk: over the blocks, between `begin` and `release`; None where the network is estimated as a whole.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        biases: Mapping[str, str],
        orientations: Mapping[str, Orientation],
        recipe: Curvature,
        *,
        max_memory: int | None,
        sharing: int,
        progress: bool,
        timed: Stopwatch,
        stage: str,
        blocks: Blocks | None = None,
        block_gradients: str = "outputs",
        offload: bool = False,
    ) -> None:
        recipe.check(weights)
        self.model, self._parameters, self.recipe = model, weights, recipe
        self._orientations = orientations
        self.known_biases = dict(biases) if recipe.takes_biases else {}
        self.num_grads = recipe.num_grads or recipe.default_num_grads
        self.grad_batch_size = recipe.grad_batch_size or 1
        self._given_memory, self._sharing = max_memory, sharing
        self.max_memory = None if max_memory is None else max_memory // sharing
        self.progress, self._timed, self._stage = progress, timed, stage
        self._blocks, self._offload = blocks, offload
        self._of_loss = block_gradients == "loss" and bool(recipe.observes - {"inputs"})
        self.walk: BlockWalk | None = None
        self._outputs: list[Tensor] = []  # of the block that is held, where it was observed before it was pruned
        self.groups = self._split()
        self.estimate: Estimate[Any] = recipe.start({})
        self.held: list[str] = []
        self.used_grads = 0
        self._source: DataSource | None = None
        self._masks: dict[str, Tensor] = {}

    @property
    def carries_over(self) -> bool:
        """Tell whether the next estimate starts from this one; where parameters are split, none is there at its end."""
        return self.recipe.prior_weight > 0 and len(self.groups) == 1

    @property
    def one_by_one(self) -> bool:
        """Tell whether some groups are to be pruned before others are estimated."""
        return self.recipe.sequential or (self._blocks is not None and not self._of_loss)

    @property
    def parts(self) -> list[list[list[str]]]:
        """Groups that are pruned together, in order: each by itself, those of a block, or all."""
        if not self.one_by_one:
            return [self.groups]
        if self._blocks is None:
            return [[group] for group in self.groups]
        of = self._blocks.of
        return [list(groups) for _, groups in itertools.groupby(self.groups, key=lambda group: of(group[0]))]

    @property
    def samples(self) -> int:
        """Count the samples that the last estimate was to be made from."""
        num_grads = self.num_grads if self._source is None else self._source.num_grads
        return num_grads * self.grad_batch_size

    @property
    def ready(self) -> bool:
        """Tell whether there is curvature, or data to estimate it on."""
        return bool(self._source or self.held)

    def begin(
        self,
        data: Iterable[Any] | None,
        loss_fn: LossFunction | None,
        masks: Mapping[str, Tensor],
        *,
        num_grads: int | None = None,
        seed: int = 0,
    ) -> None:
        """Forget the last estimate, and make at once the one that needs no second pass over the data.

        Args:
            data, loss_fn, seed: see `observe`.
            masks: name -> bool tensor, True = kept.
            num_grads: fewer than usual.
        """
        self.release()
        if self.recipe.observes:
            name = type(self.recipe).__name__
            if self._blocks is None or self._of_loss:
                label_sampler(self._labels(loss_fn), loss_fn, self.recipe.likelihood)
            if data is None:
                raise ValueError(f"{name} needs data, got None")
            if len(self.groups) > 1 and self._blocks is None:
                why = "inputs='sequential'" if self.recipe.sequential else "max_memory"
                require_rereadable(data, f"{why} splits the parameters over several passes")
            if self.recipe.num_passes > 1 and self._blocks is None:
                require_rereadable(data, f"{name} learns in {self.recipe.num_passes} passes")
        source = DataSource(() if data is None else data, loss_fn, num_grads or self.num_grads, seed)
        self._masks = dict(masks)
        if self._blocks is not None:
            self.walk = self._started(self._blocks, source)
        elif len(self.groups) == 1:
            self._observe(self.groups[0], source)
        self._source = source

    def hold(self, names: list[str]) -> Estimate[Any]:
        """Return the curvature of this group, estimated now unless it is there."""
        if self.held != names:
            assert self._source is not None
            self._observe(names, self._source)
        return self.estimate

    def release(self) -> None:
        """Forget the data and the curvature, unless the next estimate starts from it."""
        self._source, self.walk, self.held, self._outputs = None, None, [], []
        if not self.carries_over:
            self.estimate = self.recipe.start({})

    def weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name -> the weights as they are now, as the parameters have them."""
        return {name: self._parameters[name].detach() for name in names}

    def oriented(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Name -> what is of the shape of a parameter, as the curvature has it; what is of biases as it is."""
        known = self._orientations
        return {name: known[name].to_matrix(x) if name in known else x for name, x in tensors.items()}

    def orientation(self, name: str) -> Orientation:
        """Return how a parameter is seen as a matrix."""
        return self._orientations[name]

    def as_parameters(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `oriented`."""
        known = self._orientations
        return {name: known[name].to_parameter(x) if name in known else x for name, x in tensors.items()}

    def biases(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Name of the weight -> its layer's bias as it is now, of those that the curvature knows."""
        return {name: p.detach() for name, p in self._bias_parameters(names).items()}

    def is_conditioned_on(self, masks: Mapping[str, Tensor]) -> bool:
        """Tell whether the inverse is that of the sub-matrix of the weights kept by these masks."""
        if not self.recipe.conditions_on_masks:
            return not any(read((~mask).any() for mask in masks.values()))
        pairs = ((mask, masks[name]) for name, mask in self._masks.items())
        return not any(read((mask != other).any() for mask, other in pairs if mask is not other))

    def state_dict(self) -> dict[str, Any]:
        """Return the curvature, if it is held."""
        return {
            "held": list(self.held),
            "used_grads": self.used_grads if self.held else 0,
            "masks_at_estimate": pack_masks(self._masks) if self.held else {},
            "model": type(self.recipe).__name__,
            "curvature": self.estimate.state_dict() if self.held else {},
        }

    def loaded(self, state: Mapping[str, Any]) -> "Estimator":
        """Make a copy of this estimator that holds what `state_dict` returned; ValueError where it is of another."""
        model, held = (state_entry(state, key, "an estimate") for key in ("model", "held"))
        if model != (own := type(self.recipe).__name__):
            raise ValueError(f"expected the state of {own}, got that of {model}")
        loaded = object.__new__(Estimator)
        vars(loaded).update(vars(self))
        loaded._source, loaded.held, loaded._masks = None, list(held), {}
        loaded.used_grads = int(state_entry(state, "used_grads", "an estimate"))
        loaded.estimate = self.recipe.start({})
        if held:
            if list(held) != list(self._parameters):
                raise ValueError(f"expected curvature of {list(self._parameters)}, got that of {list(held)}")
            masks = Masks(self._parameters)
            masks.load_state_dict(state_entry(state, "masks_at_estimate", "an estimate"))
            loaded._masks = dict(masks)
            loaded.estimate = self._start(held)
            loaded.estimate.load_state_dict(state_entry(state, "curvature", "an estimate"))
        return loaded

    def _start(self, names: list[str], previous: Estimate[Any] | None = None) -> Estimate[Any]:
        weights = self.oriented(self.weights(names))
        return self.recipe.start(weights, self.known_biases, previous=previous, progress=self.progress)

    def _labels(self, loss_fn: LossFunction | None) -> str:
        """Tell where targets come from: for a loss of the model's own, from the data unless told otherwise."""
        return self.recipe.labels or ("data" if loss_fn is None else self.recipe.default_labels)

    def _observe(self, names: list[str], source: DataSource) -> None:
        self.held = []
        observed = {name: self._parameters[name] for name in names}
        if "gradients" in self.recipe.observes:
            observed |= {self.known_biases[name]: bias for name, bias in self._bias_parameters(names).items()}
        with self._timed(self._stage):
            previous = self.estimate if self.carries_over else None
            self.estimate = self.recipe.start({})  # before there is memory for what is next
            self._warn_of_memory(names, source.num_grads)
            self.estimate = self._start(names, previous)
            self.estimate.keep_bytes = 0 if self.max_memory is not None else self._chunk_bytes(names)
            del previous
            if recorded := self.recipe.recorded(names):
                masks = self._masks if self.recipe.conditions_on_masks else {}
                kept = {name: x * masks[name] if name in masks else x for name, x in recorded.items()}
                self.estimate.update(Observation(1, self.oriented({name: x[None] for name, x in kept.items()})))
            for number in range(self.recipe.num_passes if self.recipe.observes else 0):
                seen = self._seen(names, source)
                self.used_grads = observe(
                    seen.model,
                    seen.data,
                    seen.loss_fn,
                    self.estimate,
                    observed,
                    masks={name: self._masks[name] for name in names} if self.recipe.conditions_on_masks else None,
                    orientations=self._orientations,
                    biases={name: (self.known_biases[name], bias) for name, bias in self.biases(names).items()},
                    num_grads=source.num_grads if self.walk is None else self.walk.samples // self.grad_batch_size,
                    grad_batch_size=self.grad_batch_size,
                    labels=seen.labels,
                    likelihood=seen.likelihood,
                    seed=source.seed + number,  # other labels in each pass
                    chunk_bytes=self._chunk_bytes(names),
                    progress=self.progress,
                    keep_outputs=seen.keep_outputs,
                )
        self.held = names

    def _seen(self, names: list[str], source: DataSource) -> "_Seen":
        """Say what is observed for these parameters: the network on the data, or a block on its inputs."""
        if self.walk is None or self._blocks is None:
            labels, likelihood = self._labels(source.loss_fn), self.recipe.likelihood
            return _Seen(self.model, source.data, source.loss_fn, labels, likelihood, None)
        index = [*self._blocks.modules].index(str(self._blocks.of(names[0])))
        walk = self.walk
        if self._of_loss:
            walk.position = index
            return _Seen(walk.segment(), walk.data(), linear_loss, "data", None, None)
        if walk.position > index:
            raise RuntimeError("call estimate(data, loss_fn) before each prune_to")
        while walk.position < index:
            walk.advance(self._outputs)
            self._outputs = []
        keep = None
        if self.recipe.dense_inputs and not self._outputs:
            self._outputs = []
            keep = self._outputs.append
        if self.recipe.observes == {"inputs"}:
            return _Seen(walk.segment(), walk.data(), nn.functional.mse_loss, "data", None, keep)
        segment = walk.segment(unit=walk.root_mean_square())
        return _Seen(segment, walk.data(), nn.functional.mse_loss, "model", "gaussian", None)

    def _started(self, blocks: Blocks, source: DataSource) -> BlockWalk:
        """Begin a walk over the blocks of the network as it is now."""
        device = next(iter(self._parameters.values())).device
        needs_loss = self._of_loss
        limit = source.num_grads * self.grad_batch_size
        own_loss = source.loss_fn is None if needs_loss else None
        held_on = torch.device("cpu") if self._offload else None
        walk = BlockWalk(self.model, blocks, device=device, seed=source.seed, held_on=held_on)
        with self._timed("hidden states"):
            drawn = not needs_loss or self._labels(source.loss_fn) == "model"
            stream = chunks(source.data, CHUNK_SAMPLES, limit, device, own_loss=own_loss, needs_targets=not drawn)
            loss_fn = sample_loss(source.loss_fn)
            if own_loss:
                with running(self.model, device, source.seed):
                    loss_fn, stream = known_loss(self.model, self._parameters, stream)
            walk.start(stream)
            if walk.samples < limit:
                warnings.warn(f"the data ended after {walk.samples} of {limit} samples; these are used", stacklevel=2)
            if needs_loss:
                sampler = label_sampler(self._labels(source.loss_fn), source.loss_fn, self.recipe.likelihood)
                walk.differentiate(loss_fn, drawing(sampler, loss_fn, device, source.seed))
        return walk

    def _warn_of_memory(self, names: list[str], num_grads: int) -> None:
        """Say it before the data is read where the estimate will not fit into the memory that is free."""
        matrices = self.oriented(self.weights(names))
        needed: dict[torch.device, int] = {}
        for name, x in matrices.items():
            held = self.recipe.state_bytes(name, x, num_grads, name in self.known_biases)
            needed[x.device] = needed.get(x.device, 0) + held
        for device, total in needed.items():
            free = free_bytes(device)
            if free is not None and total > free:
                weights = sum(x.numel() for x in matrices.values() if x.device == device)
                warnings.warn(
                    f"an estimate by {type(self.recipe).__name__} of {weights:,} weights from {num_grads:,} gradients "
                    f"takes {total / 2**30:.1f} GiB on {device}, of which {free / 2**30:.1f} GiB are free; "
                    + (
                        "max_memory= estimates some parameters at a time"
                        if self.recipe.per_parameter
                        else "num_grads= or params= make it smaller"
                    ),
                    stacklevel=2,
                )

    def _bias_parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        biases = self.known_biases
        return {name: self.model.get_parameter(biases[name]) for name in names if name in biases}

    def _split(self) -> list[list[str]]:
        """Groups of parameters whose curvature fits into max_memory at a time, with the workspace it needs."""
        blocks, sequential = self._blocks, self.recipe.sequential and self._blocks is None
        if self.max_memory is None and not sequential and blocks is None:
            return [list(self._parameters)]
        most = float("inf") if self.max_memory is None else self.max_memory
        if blocks is not None and (self.max_memory is None or not self.recipe.per_parameter):
            parts = [[name for name in self._parameters if blocks.of(name) == block] for block in blocks.modules]
            parts = [part for part in parts if part]
        else:
            parts = [[name] for name in self._parameters] if self.recipe.per_parameter else [list(self._parameters)]
        largest = max(parts, key=self.bytes_of)
        if (needed := self.bytes_of(largest)) > most:
            what = "all parameters together need" if len(largest) > 1 else f"{largest[0]} needs"
            raise ValueError(
                f"max_memory={self._given_memory} is too small for {type(self.recipe).__name__}: "
                f"{what} at least {needed * self._sharing} bytes"
                + (", half of them for allocation=" if self._sharing > 1 else "")
            )
        groups = [parts[0]]
        for part in parts[1:]:
            apart = sequential or (blocks is not None and blocks.of(groups[-1][0]) != blocks.of(part[0]))
            if apart or self.bytes_of(groups[-1] + part) > most:
                groups.append([])
            groups[-1].extend(part)
        return groups

    def bytes_of(self, names: list[str], num_gradients: int = 1) -> int:
        """State of these parameters, the largest workspace that one of them needs, and some gradients."""
        matrices = self.oriented(self.weights(names))
        weights = [(name, x, self.num_grads, name in self.known_biases) for name, x in matrices.items()]
        held = sum(self.recipe.state_bytes(*weight) for weight in weights)
        workspace = max(self.recipe.workspace_bytes(*weight) for weight in weights)
        gradients = gradient_bytes(self._parameters[name] for name in names) if self.recipe.observes else 0
        return held + workspace + num_gradients * gradients

    def _chunk_bytes(self, names: list[str]) -> int:
        """Memory for gradients of these parameters, or for inputs as rows, at a time."""
        free = chunk_bytes(next(iter(self._parameters.values())).device)
        return free if self.max_memory is None else min(free, self.max_memory - self.bytes_of(names, 0))
