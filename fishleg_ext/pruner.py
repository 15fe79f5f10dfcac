"""The loop: observe, score, select, compensate, mask. The only file that sees every stage."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Optional, Union

import torch
from torch import Tensor, nn

from fishleg_ext.compensation import exact_update, simultaneous_update
from fishleg_ext.costs import Costs, total_cost
from fishleg_ext.curvature import Curvature, make_curvature
from fishleg_ext.masks import Masks
from fishleg_ext.observe import (
    CHUNK_BYTES,
    Likelihood,
    LossFunction,
    label_sampler,
    observe,
    recalibrate_batchnorm,
)
from fishleg_ext.ops import use_impl
from fishleg_ext.parameters import ParameterChoice, check_weight, choose_parameters
from fishleg_ext.saliency import exact_costs, simultaneous_costs
from fishleg_ext.selection import select

Sparsity = Union[float, Mapping[str, float]]


@dataclass(frozen=True)
class PruneResult:
    """What was pruned.

    Attributes:
        masks: name -> bool tensor, True = kept.
        sparsity: pruned weights over all weights that could be pruned.
        layer_sparsity: name -> the same for one parameter.
        predicted_loss_increase: by the curvature model, the exact joint cost of losing these weights with all others
            free to make up for it (for block models those of the same block); summed over rounds.
        history: a dict for each round: "sparsity", "layer_sparsity", "num_grads", "predicted_loss_increase",
            "damping_raised" (name -> blocks) and "seconds" (stage -> seconds). JSON-able.
    """

    masks: dict[str, Tensor] = field(repr=False)
    sparsity: float
    layer_sparsity: dict[str, float] = field(repr=False)
    predicted_loss_increase: float
    history: list[dict[str, Any]] = field(repr=False)


class Pruner:
    """Prunes a model step by step: `estimate` the curvature, `prune_to` a sparsity, train if you like, and again.

    Arguments are those of `prune`. A pruner holds masks and curvature; the model is changed by `prune_to`,
    `apply_masks` and `finalize` alone.

    >>> model = nn.Linear(4, 2)
    >>> data = [(torch.randn(16, 4), torch.randint(2, (16,)))]
    >>> pruner = Pruner(model, curvature="block", num_grads=16, progress=False)
    >>> pruner.estimate(data, nn.functional.cross_entropy)
    >>> pruner.prune_to(0.5).sparsity
    0.5
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        curvature: Union[str, Curvature] = "block",
        saliency: Optional[str] = None,
        scope: Union[str, Mapping[str, float], None] = None,
        pattern: str = "unstructured",
        params: Optional[ParameterChoice] = None,
        num_grads: Optional[int] = None,
        grad_batch_size: int = 1,
        block_size: int = 128,
        damping: Optional[float] = None,
        labels: Optional[str] = None,
        likelihood: Optional[Likelihood] = None,
        recalibrate_batchnorm: bool = False,
        max_memory: Optional[int] = None,
        impl: str = "auto",
        seed: int = 0,
        progress: bool = True,
    ) -> None:
        self.curvature = make_curvature(curvature, block_size=block_size, damping=damping)
        self.saliency = self.curvature.default_saliency if saliency is None else saliency
        if self.saliency not in ("exact", "simultaneous"):
            raise ValueError(f"expected saliency to be 'exact' or 'simultaneous', got {saliency!r}")
        self.scope = self.curvature.default_scope if scope is None else scope
        self.labels = self.curvature.default_labels if labels is None else labels
        self.num_grads = self.curvature.default_num_grads if num_grads is None else num_grads
        for name, count in (("num_grads", self.num_grads), ("grad_batch_size", grad_batch_size)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"expected {name} to be an integer >= 1, got {count!r}")
        _check_pattern(pattern)
        self.model = model
        self.weights = choose_parameters(model, params)
        self._check_scope()
        self._masks = Masks(self.weights)
        self.grad_batch_size = grad_batch_size
        self.likelihood = likelihood
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.impl = use_impl(impl).impl
        self.seed = seed
        self.progress = self.curvature.progress = progress
        self.history: list[dict[str, Any]] = []
        self.max_memory = max_memory
        self._groups = self._split_by_memory()
        self._source: Optional[tuple[Iterable[Any], LossFunction]] = None
        self._held: list[str] = []  # whose curvature is estimated
        self._masks_at_estimate: dict[str, Tensor] = {}
        self._seconds: dict[str, float] = {}
        self._used_grads = 0

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor, True = kept."""
        return dict(self._masks)

    def estimate(self, data: Optional[Iterable[Any]], loss_fn: LossFunction) -> None:
        """Estimate the curvature of the model as it is now, forgetting earlier estimates.

        Args:
            data: iterable of (inputs, targets) batches; may be None where the curvature observes nothing. Where
                `max_memory` splits the estimate it is read again by `prune_to`.
            loss_fn: (outputs, targets) -> scalar, the mean over the batch.

        Raises:
            ValueError: no data, data that can be read only once where it is needed again, labels="model" without a
                likelihood, weights or gradients with NaN or inf.
        """
        if self.curvature.observes:
            if data is None:
                raise ValueError(f"{type(self.curvature).__name__} needs data, got None")
            label_sampler(self.labels, loss_fn, self.likelihood)
            if len(self._groups) > 1:
                require_rereadable(data, "max_memory splits the parameters over several passes")
        self._source = (data if data is not None else (), loss_fn)
        self._seconds = {}
        self._masks_at_estimate = dict(self._masks)
        self._held = []
        if len(self._groups) == 1:
            self._observe(self._groups[0])

    def prune_to(self, sparsity: Optional[Sparsity] = None) -> PruneResult:
        """Prune weights, move the others to make up for it, and mask. If anything is raised, nothing is changed.

        Several calls after one estimate go on where the last one stopped, under the same curvature.

        Args:
            sparsity: pruned weights over all weights afterwards, in [0, 1), earlier ones included; or name -> that of
                each parameter, the others staying as they are. None takes `scope`, if that is such a dict.

        Raises:
            RuntimeError: `estimate` was not called.
            ValueError: sparsity out of range, or below what is pruned already.
        """
        if self._source is None:
            raise RuntimeError("call estimate(data, loss_fn) before prune_to")
        num_pruned = self._num_pruned(sparsity)
        dead_first = any(not torch.equal(mask, self._masks[name]) for name, mask in self._masks_at_estimate.items())
        with use_impl(self.impl), torch.no_grad():
            costs: dict[str, Costs] = {}
            for group in self._groups:
                self._observe(group)
                with self._timed("saliency"):
                    costs |= self._costs(group, dead_first)
            with self._timed("selection"):
                masks = select(costs, num_pruned)
            increase = 0.0
            updated: dict[str, Tensor] = {}
            for group in reversed(self._groups):  # the last one is still held
                self._observe(group)
                with self._timed("compensation"):
                    updated |= self._updated(group, masks)
                    if self.saliency == "simultaneous" or not self.curvature.block_diagonal:
                        gone = {name: ~masks[name] for name in group}
                        increase += self.curvature.joint_cost(self._weights(group), gone)
            if self.saliency == "exact" and self.curvature.block_diagonal:
                increase = total_cost(costs, masks)
            for name, weight in updated.items():
                if not weight.isfinite().all():
                    raise ValueError(f"compensating for what was pruned of {name} gave NaN or inf; use more damping")
            self._masks.set(masks)
            for name, weight in updated.items():
                self.weights[name].copy_(weight)
        self._record(increase)
        return self._result()

    def step(self) -> NoReturn:
        """Prune by a schedule; not in this version yet."""
        raise NotImplementedError("schedules are not in this version yet; call estimate and prune_to")

    def attach(self, optimizer: torch.optim.Optimizer) -> NoReturn:
        """Keep pruned weights zero after every optimizer step; not in this version yet."""
        raise NotImplementedError("attach is not in this version yet; call apply_masks() after optimizer.step()")

    def apply_masks(self) -> None:
        """Zero the pruned weights of the model, as after an optimizer step that revived them."""
        with use_impl(self.impl):
            self._masks.apply()

    def finalize(self) -> PruneResult:
        """Leave the model as a plain one: zeros are in the weights; BatchNorm recalibrated if that was asked for."""
        self.apply_masks()
        if self.recalibrate_batchnorm:
            if self._source is None:
                raise RuntimeError(
                    "call estimate(data, loss_fn) before finalize, which recalibrates BatchNorm on its data"
                )
            recalibrate_batchnorm(
                self.model,
                self._source[0],
                num_samples=self.num_grads * self.grad_batch_size,
                seed=self.seed,
                progress=self.progress,
            )
        return self._result()

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed), curvature, history: tensors, numbers and strings, for `torch.save` and `weights_only`."""
        return {
            "masks": self._masks.state_dict(),
            "held": list(self._held),
            "curvature": self.curvature.state_dict() if self._held else {},
            "history": self.history,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for a pruner of the same model made with the same arguments.

        The model's own weights are not part of the state; load them beside it. `prune_to` needs a new `estimate`.

        Raises:
            ValueError: the state is of other parameters or shapes; nothing is changed then.
        """
        missing = {"masks", "held", "curvature", "history"} - state.keys()
        if missing:
            raise ValueError(f"expected the state of a Pruner, but it has no {', '.join(sorted(missing))}")
        self._masks.load_state_dict(state["masks"])
        if state["held"]:
            self.curvature.start(self._weights(state["held"]))
            self.curvature.load_state_dict(state["curvature"])
        self._held = list(state["held"])
        self.history = list(state["history"])

    def _check_scope(self) -> None:
        if isinstance(self.scope, Mapping):
            self._check_names(self.scope)
            for name, sparsity in self.scope.items():
                check_sparsity(sparsity, f"sparsity of {name}")
        elif self.scope not in ("global", "layer"):
            raise ValueError(f"expected scope to be 'global', 'layer' or a dict of sparsities, got {self.scope!r}")

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.weights]
        if unknown:
            raise ValueError(f"{', '.join(unknown)} not among the pruned parameters {', '.join(self.weights)}")

    def _split_by_memory(self) -> list[list[str]]:
        """Groups of parameters whose curvature fits into max_memory at a time, with the workspace it needs."""
        if self.max_memory is None:
            return [list(self.weights)]
        held = {n: self.curvature.state_bytes(w, self.num_grads) for n, w in self.weights.items()}
        groups: list[list[str]] = [[]]
        for name in self.weights:
            needed = self._bytes_of([*groups[-1], name], held)
            if groups[-1] and self.curvature.separable and needed > self.max_memory:
                groups.append([])
                needed = self._bytes_of([name], held)
            groups[-1].append(name)
            if needed > self.max_memory:
                what = name if self.curvature.separable else "all parameters together"
                raise ValueError(
                    f"max_memory={self.max_memory} is too small for {type(self.curvature).__name__}: "
                    f"{what} needs {needed} bytes"
                )
        return groups

    def _bytes_of(self, names: list[str], held: Mapping[str, int]) -> int:
        """State of these parameters, the inverse of the largest and its workspace, and one gradient."""
        one_gradient = sum(self.weights[name].numel() * self.weights[name].element_size() for name in names)
        return sum(held[name] for name in names) + 2 * max(held[name] for name in names) + one_gradient

    def _weights(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {name: self.weights[name].detach() for name in names}

    def _observe(self, names: list[str]) -> None:
        """Estimate the curvature of these parameters, unless it is held."""
        if self._held == names:
            return
        assert self._source is not None
        data, loss_fn = self._source
        weights = {name: self.weights[name] for name in names}
        for name, weight in weights.items():
            check_weight(name, weight)
        self._held = []
        with self._timed("observation"), use_impl(self.impl):
            self.curvature.start(self._weights(names))
            if self.curvature.observes:
                chunk_bytes = CHUNK_BYTES
                if self.max_memory is not None:
                    chunk_bytes = min(CHUNK_BYTES, self.max_memory // 8)
                self._used_grads = observe(
                    self.model,
                    data,
                    loss_fn,
                    self.curvature,
                    weights,
                    masks={name: self._masks_at_estimate[name] for name in names},
                    num_grads=self.num_grads,
                    grad_batch_size=self.grad_batch_size,
                    labels=self.labels,
                    likelihood=self.likelihood,
                    seed=self.seed,
                    chunk_bytes=chunk_bytes,
                    progress=self.progress,
                )
        self._held = names

    def _costs(self, names: list[str], dead_first: bool) -> dict[str, Costs]:
        weights, masks = self._weights(names), {name: self._masks[name] for name in names}
        if self.saliency == "simultaneous":
            return simultaneous_costs(self.curvature, weights, masks)
        return exact_costs(self.curvature, weights, masks, dead_first=dead_first, progress=self.progress)

    def _updated(self, names: list[str], masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = self._weights(names)
        masks = {name: masks[name] for name in names}
        if self.saliency == "simultaneous":
            return simultaneous_update(self.curvature, weights, masks)
        return exact_update(self.curvature, weights, masks, progress=self.progress)

    def _num_pruned(self, sparsity: Optional[Sparsity]) -> Union[int, dict[str, int]]:
        """How many weights are pruned afterwards, in all or of each parameter."""
        if sparsity is None:
            if not isinstance(self.scope, Mapping):
                raise ValueError("expected a sparsity, got None")
            sparsity = self.scope
        before = self._masks.num_pruned()
        sizes = {name: mask.numel() for name, mask in self._masks.items()}
        if isinstance(sparsity, Mapping):
            self._check_names(sparsity)
            wanted = {n: check_sparsity(s, f"sparsity of {n}") for n, s in sparsity.items()}
        elif self.scope == "layer":
            wanted = dict.fromkeys(sizes, check_sparsity(sparsity))
        elif self.scope == "global":
            target, done = (
                round(check_sparsity(sparsity) * sum(sizes.values())),
                sum(before.values()),
            )
            if target < done:
                raise ValueError(f"sparsity {sparsity} is {target} weights, but {done} are pruned already")
            return target
        else:
            raise ValueError(f"expected a dict of sparsities or None, as scope is a dict, got {sparsity}")
        targets = dict(before)
        for name, value in wanted.items():
            targets[name] = round(value * sizes[name])
            if targets[name] < before[name]:
                raise ValueError(
                    f"sparsity {value} of {name} is {targets[name]} weights, but {before[name]} are pruned already"
                )
        return targets

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] = self._seconds.get(stage, 0.0) + time.perf_counter() - start

    def _record(self, increase: float) -> None:
        self.history.append(
            {
                "sparsity": self._masks.sparsity(),
                "layer_sparsity": self._masks.layer_sparsity(),
                "num_grads": self._used_grads,
                "predicted_loss_increase": increase,
                "damping_raised": dict(self.curvature.damping_raised),
                "seconds": self._seconds,
            }
        )
        self._seconds = {}

    def _result(self) -> PruneResult:
        return PruneResult(
            masks={name: mask.clone() for name, mask in self._masks.items()},
            sparsity=self._masks.sparsity(),
            layer_sparsity=self._masks.layer_sparsity(),
            predicted_loss_increase=sum(entry["predicted_loss_increase"] for entry in self.history),
            history=list(self.history),
        )


def prune(
    model: nn.Module,
    data: Optional[Iterable[Any]],
    loss_fn: LossFunction = nn.functional.cross_entropy,
    *,
    sparsity: Optional[float] = None,
    curvature: Union[str, Curvature] = "block",
    saliency: Optional[str] = None,
    scope: Union[str, Mapping[str, float], None] = None,
    pattern: str = "unstructured",
    params: Optional[ParameterChoice] = None,
    num_grads: Optional[int] = None,
    grad_batch_size: int = 1,
    recomputations: int = 1,
    block_size: int = 128,
    damping: Optional[float] = None,
    labels: Optional[str] = None,
    likelihood: Optional[Likelihood] = None,
    recalibrate_batchnorm: bool = False,
    max_memory: Optional[int] = None,
    impl: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> PruneResult:
    """Prune a model in place, in one call. If anything is raised, the model is as before the call.

    Args:
        model: any module.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords). May
            be None with curvature="identity".
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        sparsity: pruned weights over all weights, in [0, 1): exactly round(sparsity * n) become zero.
        curvature: "identity" (magnitude), "diagonal", "block" (WoodFisher, oBERT, CAP), "low_rank" (M-FAC), or a
            `fishleg_ext.curvature.Curvature`.
        saliency: "exact" (greedy elimination in blocks) or "simultaneous" (single-weight formula). None is the
            curvature's default: exact for block, simultaneous for the others.
        scope: "global" (one threshold for all parameters), "layer" (the same sparsity in each), or a dict
            name -> sparsity; parameters not in it stay dense. None is the curvature's default, "global".
        pattern: "unstructured"; "n:m" and "blockN" are not in this version yet.
        params: a name, "re:..." (searched for in names), a list of these, or a predicate (name, parameter) -> bool.
            None is the weight of every Linear and Conv layer.
        num_grads: gradients the Fisher matrix is estimated from; None is the curvature's default, 1,024.
        grad_batch_size: samples in each gradient.
        recomputations: rounds of estimating and pruning; the density falls geometrically.
        block_size: weights in a block of the Fisher matrix.
        damping: added to the Fisher's diagonal; None is the curvature's default, 1e-5.
        labels: "data" (empirical Fisher) or "model" (sampled from the likelihood: true Fisher).
        likelihood: of labels="model": "categorical", "gaussian", "bernoulli" or (outputs, generator) -> targets. May be
            None with cross_entropy.
        recalibrate_batchnorm: afterwards recompute running statistics on num_grads * grad_batch_size samples.
        max_memory: bytes for curvature at a time; splits the parameters over several passes over the data.
        impl: "auto", "reference", "triton" or "cuda"; for every op.
        seed: of sampled labels, and of PyTorch's RNG while the data is read.
        progress: show progress bars (where standard error is a terminal).

    Raises:
        ValueError, TypeError: an argument that does not fit; empty data; NaN or inf in weights or gradients, by
            parameter; one-shot data that is needed more than once.
        CurvatureError: a Fisher matrix that cannot be inverted, by parameter.
        NotImplementedError: what this version does not have yet.

    >>> model = nn.Linear(4, 2)
    >>> data = [(torch.randn(16, 4), torch.randint(2, (16,)))]
    >>> prune(model, data, sparsity=0.75, num_grads=16, progress=False).sparsity
    0.75
    """
    if isinstance(recomputations, bool) or not isinstance(recomputations, int) or recomputations < 1:
        raise ValueError(f"expected recomputations to be an integer >= 1, got {recomputations!r}")
    target: Sparsity
    if isinstance(scope, Mapping):
        if sparsity is not None:
            raise ValueError("expected either sparsity or a dict of sparsities as scope, got both")
        target = scope
    elif sparsity is None:
        raise ValueError("expected a sparsity in [0, 1), got None")
    else:
        target = check_sparsity(sparsity)
    pruner = Pruner(
        model,
        curvature=curvature,
        saliency=saliency,
        scope=scope,
        pattern=pattern,
        params=params,
        num_grads=num_grads,
        grad_batch_size=grad_batch_size,
        block_size=block_size,
        damping=damping,
        labels=labels,
        likelihood=likelihood,
        recalibrate_batchnorm=recalibrate_batchnorm,
        max_memory=max_memory,
        impl=impl,
        seed=seed,
        progress=progress,
    )
    if data is not None and recomputations > 1 and pruner.curvature.observes:
        require_rereadable(data, f"recomputations={recomputations}")
    if data is not None and recalibrate_batchnorm and pruner.curvature.observes:
        require_rereadable(data, "recalibrate_batchnorm=True")
    with _restored_on_error(pruner.weights.values()):
        for done in range(1, recomputations + 1):
            pruner.estimate(data, loss_fn)
            pruner.prune_to(_part_way(target, done / recomputations))
        return pruner.finalize()


def check_sparsity(sparsity: float, name: str = "sparsity") -> float:
    """`sparsity` if it is in [0, 1)."""
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
        raise TypeError(f"expected {name} to be a number in [0, 1), got {sparsity!r}")
    if not 0 <= sparsity < 1:
        raise ValueError(f"expected {name} in [0, 1), got {sparsity}")
    return float(sparsity)


def require_rereadable(data: Iterable[Any], why: str) -> None:
    """Raise if the data can be iterated over only once."""
    if iter(data) is data:
        raise ValueError(
            f"expected data that can be read again, as {why}, got a one-shot {type(data).__name__}; "
            "pass a list or a DataLoader"
        )


def _part_way(target: Sparsity, part: float) -> Sparsity:
    """The sparsity whose density lies geometrically between 1 and the target's."""
    if isinstance(target, Mapping):
        return {name: 1 - (1 - sparsity) ** part for name, sparsity in target.items()}
    return target if part == 1 else 1 - (1 - target) ** part


def _check_pattern(pattern: str) -> None:
    if pattern == "unstructured":
        return
    kept, colon, group = pattern.partition(":")
    is_nm = bool(colon) and kept.isdigit() and group.isdigit() and int(kept) <= int(group)
    is_block = pattern.startswith("block") and pattern[5:].isdigit() and int(pattern[5:]) > 0
    if is_nm or is_block:
        raise NotImplementedError(f"pattern={pattern!r} is not in this version yet, only 'unstructured'")
    raise ValueError(f"expected pattern to be 'unstructured', 'n:m' or 'blockN', got {pattern!r}")


@contextlib.contextmanager
def _restored_on_error(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """The weights as they were, should anything be raised."""
    before = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)
        raise
