"""The loop: observe, score, select, compensate, mask. The only file that sees every stage."""

import contextlib
import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Optional, Union

import torch
from torch import Tensor, nn

from fishleg_ext.arguments import checked_count, checked_sparsity
from fishleg_ext.compensation import exact_update, simultaneous_update
from fishleg_ext.costs import Costs, total_cost
from fishleg_ext.curvature import Curvature, make_curvature
from fishleg_ext.estimate import Estimate, Stopwatch
from fishleg_ext.fixed_order import fixed_order_prune
from fishleg_ext.labels import Likelihood, LossFunction
from fishleg_ext.masks import Masks
from fishleg_ext.observe import recalibrate_batchnorm, require_rereadable
from fishleg_ext.ops import use_impl
from fishleg_ext.ops.dispatch import check_impl
from fishleg_ext.parameters import ParameterChoice, biases_of, check_weight, choose_parameters
from fishleg_ext.saliency import exact_costs, simultaneous_costs
from fishleg_ext.selection import select

Sparsity = Union[float, Mapping[str, float]]
SALIENCIES = ("exact", "simultaneous", "fixed_order")


@dataclass(frozen=True)
class PruneResult:
    """What was pruned.

    Attributes:
        masks: name -> bool tensor, True = kept.
        sparsity: pruned weights over all weights that could be pruned.
        layer_sparsity: name -> the same for one parameter.
        predicted_loss_increase: by the curvature model, the exact joint cost of losing these weights with all others
            free to make up for it (for block models those of the same block); summed over rounds. Of layerwise
            curvature that is half the squared error of all layers' outputs, not of the network's loss.
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
        allocation: Union[str, Curvature, None] = None,
    ) -> None:
        self.curvature = make_curvature(curvature, block_size=block_size, damping=damping)
        self.saliency = self.curvature.default_saliency if saliency is None else saliency
        if self.saliency not in SALIENCIES:
            raise ValueError(f"expected saliency to be one of {', '.join(SALIENCIES)}, got {saliency!r}")
        _check_pattern(pattern)
        check_impl(impl)
        self.impl, self.seed, self.progress = impl, seed, progress
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.model = model
        self.weights = choose_parameters(model, params)
        self._biases = biases_of(model, self.weights)
        self._masks = Masks(self.weights)
        self.history: list[dict[str, Any]] = []
        self._timed = Stopwatch()
        self._damping_raised: dict[str, int] = {}
        self._data: Optional[Iterable[Any]] = None  # of the last estimate, for BatchNorm
        num_grads = None if num_grads is None else checked_count("num_grads", num_grads)
        max_memory = None if max_memory is None else checked_count("max_memory", max_memory)
        estimate = functools.partial(
            Estimate,
            model,
            self.weights,
            self._biases,
            num_grads=num_grads,
            grad_batch_size=checked_count("grad_batch_size", grad_batch_size),
            labels=labels,
            likelihood=likelihood,
            max_memory=max_memory,
            sharing=1 if allocation is None else 2,
            seed=seed,
            progress=progress,
            timed=self._timed,
        )
        self._estimate = estimate(self.curvature, stage="observation")
        self._allocation: Optional[Estimate] = None
        if allocation is not None:
            if scope is not None:
                raise ValueError(f"expected either allocation or scope, got {allocation!r} and {scope!r}")
            allocating = make_curvature(allocation, block_size=block_size, argument="allocation")
            if allocating is self.curvature:
                raise ValueError("expected another curvature as allocation, got the same instance twice")
            if allocating.sequential:
                raise ValueError("expected an allocation of all parameters at once, got one with sequential inputs")
            self._allocation = estimate(allocating, stage="allocation")
            scope = "global"
        self.scope = self.curvature.default_scope if scope is None else scope
        self._check_scope()

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor, True = kept; copies."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def estimate(self, data: Optional[Iterable[Any]], loss_fn: LossFunction) -> None:
        """Estimate the curvature of the model as it is now, forgetting earlier estimates.

        Where `max_memory` splits the estimate it is `prune_to` that reads the data, twice for each part but the last;
        with sequential inputs it reads it once for each parameter.

        Args:
            data: iterable of (inputs, targets) batches; may be None where the curvature observes nothing.
            loss_fn: (outputs, targets) -> scalar, the mean over the batch.

        Raises:
            ValueError: no data, data that can be read only once where it is needed again, labels="model" without a
                likelihood, weights or gradients with NaN or inf, single-weight scores of layerwise curvature where
                weights are pruned already.
            RuntimeError: parameters of the model were replaced since this pruner was made.
        """
        self._check_parameters()
        cleared = self.curvature.masked or self.curvature.maskable
        if self.saliency == "simultaneous" and not cleared and any(self._masks.num_pruned().values()):
            raise ValueError(
                f"expected saliency='exact' or 'fixed_order' where weights are pruned already: single-weight scores of "
                f"{type(self.curvature).__name__} would count on these to make up for others"
            )
        readers = [estimate for estimate in self._estimates() if estimate.curvature.observes]
        if data is not None and len(readers) > 1:
            require_rereadable(data, "allocation= reads it once more")
        self._timed.seconds, self._damping_raised = {}, {}
        with self._implementation():
            for estimate in self._estimates():
                estimate.begin(data, loss_fn, self._masks)
        self._data = () if data is None else data

    def prune_to(self, sparsity: Optional[Sparsity] = None) -> PruneResult:
        """Prune weights, move the others to make up for it, and mask. If anything is raised, nothing is changed.

        Several calls after one estimate go on where the last one stopped, under the same curvature; where `max_memory`
        splits the estimate, or inputs are sequential, each call needs its own.

        Args:
            sparsity: pruned weights over all weights afterwards, in [0, 1), earlier ones included; or name -> that of
                each parameter, the others staying as they are. None takes `scope`, if that is such a dict.

        Raises:
            RuntimeError: `estimate` was not called, or parameters of the model were replaced.
            ValueError: sparsity out of range or below what is pruned already, or weights with NaN or inf.
        """
        if not all(estimate.ready for estimate in self._estimates()):
            split = any(len(estimate.groups) > 1 for estimate in self._estimates())
            raise RuntimeError("call estimate(data, loss_fn) before " + ("each prune_to" if split else "prune_to"))
        num_pruned = self._num_pruned(sparsity)
        self._check_parameters()
        masks: dict[str, Tensor] = {}
        increase = 0.0
        with self._implementation(), torch.no_grad(), _restored_on_error(self._parameters()):
            if self._allocation is not None:
                num_pruned = self._allocated(self._allocation, num_pruned)
            groups = self._estimate.groups
            for part in [[group] for group in groups] if self.curvature.sequential else [groups]:
                increase += self._prune(part, num_pruned, masks)
            self._masks.set(masks)
        for estimate in self._estimates():
            if len(estimate.groups) > 1:
                estimate.release()  # the parts not held would be estimated on the weights of now
        self._record(increase)
        return self._result()

    def _allocated(self, estimate: Estimate, num_pruned: Union[int, Mapping[str, int]]) -> dict[str, int]:
        """How many weights each parameter loses where all of them compete under another curvature."""
        costs: dict[str, Costs] = {}
        for group in estimate.groups:
            estimate.hold(group)  # which is timed
            with self._timed("allocation"):
                costs |= self._costs(estimate, estimate.curvature.default_saliency, group)
            self._damping_raised |= estimate.curvature.damping_raised
        return {name: int((~mask).sum()) for name, mask in select(costs, num_pruned).items()}

    def _prune(
        self, groups: list[list[str]], num_pruned: Union[int, Mapping[str, int]], masks: dict[str, Tensor]
    ) -> float:
        """Prune these parameters of the model and add what is kept to `masks`; returns the joint cost."""
        estimate, costs = self._estimate, dict[str, Costs]()
        chosen, updated, increase = dict[str, Tensor](), dict[str, Tensor](), 0.0
        if self.saliency != "fixed_order":
            for group in groups:
                estimate.hold(group)
                with self._timed("saliency"):
                    costs |= self._costs(estimate, self.saliency, group)
                self._damping_raised |= self.curvature.damping_raised
            with self._timed("selection"):
                chosen = select(costs, num_pruned)
        costs_add_up = self.saliency == "exact" and self.curvature.block_diagonal
        for group in reversed(groups):  # the last one is still held
            estimate.hold(group)
            weights, biases, show = estimate.weights(group), estimate.biases(group), self.progress
            with self._timed("compensation"):
                if self.saliency == "fixed_order":
                    assert isinstance(num_pruned, Mapping)
                    alive = {name: self._masks[name] for name in group}
                    kept, moved = fixed_order_prune(self.curvature, weights, alive, num_pruned, biases, progress=show)
                    chosen |= kept
                elif self.saliency == "simultaneous":
                    kept = {name: chosen[name] for name in group}
                    moved = simultaneous_update(self.curvature, weights, kept, biases)
                else:
                    moved = exact_update(self.curvature, weights, chosen, biases, progress=show)
                updated |= moved
                if not costs_add_up:
                    increase += self.curvature.joint_cost(weights, {name: ~chosen[name] for name in group})
            self._damping_raised |= self.curvature.damping_raised
        if costs_add_up:
            increase = total_cost(costs, chosen)
        for name, weight in updated.items():
            if not weight.isfinite().all():
                raise ValueError(f"compensating for what was pruned of {name} gave NaN or inf; use more damping")
        for name, value in updated.items():
            self.model.get_parameter(name).copy_(value)
        masks |= chosen
        return increase

    def step(self) -> NoReturn:
        """Prune by a schedule; not in this version yet."""
        raise NotImplementedError("schedules are not in this version yet; call estimate and prune_to")

    def attach(self, optimizer: torch.optim.Optimizer) -> NoReturn:
        """Keep pruned weights zero after every optimizer step; not in this version yet."""
        raise NotImplementedError("attach is not in this version yet; call apply_masks() after optimizer.step()")

    def apply_masks(self) -> None:
        """Zero the pruned weights of the model, as after an optimizer step that revived them."""
        with self._implementation():
            self._masks.apply()

    def finalize(self) -> PruneResult:
        """Leave the model as a plain one: zeros are in the weights; BatchNorm recalibrated if that was asked for."""
        self.apply_masks()
        if self.recalibrate_batchnorm:
            if self._data is None:
                raise RuntimeError(
                    "call estimate(data, loss_fn) before finalize, which recalibrates BatchNorm on its data"
                )
            recalibrate_batchnorm(self.model, self._data, seed=self.seed, progress=self.progress)
        return self._result()

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed), the curvature if it is held, history: for `torch.save`, and to load with `weights_only`."""
        return {
            "masks": self._masks.state_dict(),
            **self._estimate.state_dict(),
            "allocation": None if self._allocation is None else self._allocation.state_dict(),
            "history": copy.deepcopy(self.history),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for a pruner of the same model made with the same arguments.

        The model's own weights are not part of the state; load them beside it. Nor are settings, such as damping:
        those of this pruner hold.

        Raises:
            ValueError: the state is of other parameters, shapes or curvature models; nothing is changed then.
        """
        missing = {
            "masks",
            "masks_at_estimate",
            "model",
            "curvature",
            "held",
            "used_grads",
            "allocation",
            "history",
        } - state.keys()
        if missing:
            raise ValueError(f"expected the state of a Pruner, but it has no {', '.join(sorted(missing))}")
        if (state["allocation"] is None) != (self._allocation is None):
            raise ValueError("expected the state of a Pruner with the same allocation")
        masks = Masks(self.weights)
        masks.load_state_dict(state["masks"])
        changed = [part for estimate in self._estimates() for part in (estimate, estimate.curvature)]
        before = [dict(vars(part)) for part in changed]
        try:
            self._estimate.load_state_dict(state)
            if self._allocation is not None:
                self._allocation.load_state_dict(state["allocation"])
        except BaseException:
            for part, values in zip(changed, before, strict=True):
                vars(part).update(values)
            raise
        self._masks = masks
        self.history = copy.deepcopy(list(state["history"]))

    def _parameters(self) -> list[nn.Parameter]:
        """All that may change: weights and biases."""
        return [*self.weights.values(), *map(self.model.get_parameter, self._biases.values())]

    def _estimates(self) -> list[Estimate]:
        return [self._estimate] if self._allocation is None else [self._allocation, self._estimate]

    def _check_parameters(self) -> None:
        """The parameters are still those of the model, and finite."""
        named = dict(self.model.named_parameters())
        for name, weight in self.weights.items():
            if named.get(name) is not weight:
                raise RuntimeError(f"{name} was replaced in the model since this Pruner was made; make a new one")
            check_weight(name, weight)

    def _check_scope(self) -> None:
        if isinstance(self.scope, Mapping):
            self._check_names(self.scope)
            for name, sparsity in self.scope.items():
                checked_sparsity(sparsity, f"sparsity of {name}")
        elif self.scope not in ("global", "layer"):
            raise ValueError(f"expected scope to be 'global', 'layer' or a dict of sparsities, got {self.scope!r}")
        elif self.scope == "global" and self._allocation is None:
            if self.saliency == "fixed_order":
                raise ValueError(
                    "expected scope='layer', a dict of sparsities or allocation= with saliency='fixed_order'"
                )
            if self.curvature.sequential:
                raise ValueError("expected scope='layer', a dict of sparsities or allocation= with sequential inputs")

    def _check_names(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.weights]
        if unknown:
            raise ValueError(
                f"{', '.join(map(str, unknown))} not among the pruned parameters {', '.join(self.weights)}"
            )

    def _costs(self, estimate: Estimate, saliency: str, names: list[str]) -> dict[str, Costs]:
        weights, masks = estimate.weights(names), {name: self._masks[name] for name in names}
        if saliency == "simultaneous":
            return simultaneous_costs(estimate.curvature, weights, masks)
        dead_first = not estimate.knows_as_dead(self._masks)
        return exact_costs(estimate.curvature, weights, masks, dead_first=dead_first, progress=self.progress)

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
            wanted = {n: checked_sparsity(s, f"sparsity of {n}") for n, s in sparsity.items()}
        elif self.scope == "layer":
            wanted = dict.fromkeys(sizes, checked_sparsity(sparsity))
        elif self.scope == "global":
            target = round(checked_sparsity(sparsity) * sum(sizes.values()))
            done = sum(before.values())
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

    def _implementation(self) -> contextlib.AbstractContextManager[None]:
        """The one asked for; "auto" leaves a `use_impl` around this in force."""
        return contextlib.nullcontext() if self.impl == "auto" else use_impl(self.impl)

    def _record(self, increase: float) -> None:
        self.history.append(
            {
                "sparsity": self._masks.sparsity(),
                "layer_sparsity": self._masks.layer_sparsity(),
                "num_grads": self._estimate.used_grads,
                "predicted_loss_increase": increase,
                "damping_raised": dict(self._damping_raised),
                "seconds": self._timed.seconds,
            }
        )
        self._timed.seconds = {}

    def _result(self) -> PruneResult:
        return PruneResult(
            masks={name: mask.clone() for name, mask in self._masks.items()},
            sparsity=self._masks.sparsity(),
            layer_sparsity=self._masks.layer_sparsity(),
            predicted_loss_increase=sum(entry["predicted_loss_increase"] for entry in self.history),
            history=copy.deepcopy(self.history),
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
    allocation: Union[str, Curvature, None] = None,
) -> PruneResult:
    """Prune a model in place, in one call. If anything is raised, the model is as before the call.

    Args:
        model: any module.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords). May
            be None with curvature="identity".
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        sparsity: pruned weights over all weights, in [0, 1): exactly round(sparsity * n) become zero, of all
            n weights or, with scope="layer", of each parameter's.
        curvature: "identity" (magnitude), "diagonal", "block" (WoodFisher, oBERT, CAP), "low_rank" (M-FAC),
            "layerwise" (OBC), "kronecker" (K-FAC), "fishleg", or a `fishleg_ext.curvature.Curvature`. Under "kronecker"
            and "fishleg" the biases of the pruned layers move with the weights; no other parameters ever change.
        saliency: "exact" (greedy elimination in blocks), "simultaneous" (single-weight formula), or "fixed_order"
            (SparseGPT: column after column; not with scope="global"). None is the curvature's default: simultaneous for
            identity, diagonal and low_rank, exact for the others.
        scope: "global" (one threshold for all parameters), "layer" (the same sparsity in each), or a dict
            name -> sparsity; parameters not in it stay dense. None is the curvature's default: "layer" for layerwise,
            "global" for the others.
        pattern: "unstructured"; "n:m" and "blockN" are not in this version yet.
        params: a name, "re:..." (searched for in names), a list of these, or a predicate (name, parameter) -> bool.
            None is the weight of every Linear and Conv layer (nn.MultiheadAttention's in_proj_weight is none of them).
        num_grads: gradients the Fisher matrix is estimated from; None is the curvature's default, 1,024, for fishleg
            2,048.
        grad_batch_size: samples in each gradient.
        recomputations: rounds of estimating and pruning; the density falls geometrically.
        block_size: weights in a block of the Fisher matrix.
        damping: added to the Fisher's diagonal; None is the curvature's default, 1e-5, for kronecker and fishleg 1e-6.
            For layerwise a share of the mean of the diagonal, 1e-4.
        labels: "data" (empirical Fisher) or "model" (sampled from the likelihood: true Fisher; the classes of
            cross_entropy by importance, so that networks that are sure of their answers give as much as others). None
            is the curvature's default: "model" for kronecker and fishleg, "data" for the others.
        likelihood: of labels="model": "categorical", "gaussian", "bernoulli" or (outputs, generator) -> targets. May be
            None with cross_entropy.
        recalibrate_batchnorm: afterwards recompute running statistics on all of the data.
        max_memory: bytes for curvature at a time; splits the parameters over several passes over the data.
        impl: "auto", "reference", "triton" or "cuda"; for every op.
        seed: of sampled labels, and of PyTorch's RNG while the data is read.
        progress: show progress bars (where standard error is a terminal).
        allocation: another curvature, by name or as an instance, in place of `scope`: with its own default saliency and
            one threshold for all parameters it says how many weights each of them loses. Of `max_memory` each of the
            two may take half.

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
    recomputations = checked_count("recomputations", recomputations)
    target: Sparsity
    if isinstance(scope, Mapping):
        if sparsity is not None:
            raise ValueError("expected either sparsity or a dict of sparsities as scope, got both")
        target = scope
    elif sparsity is None:
        raise ValueError("expected a sparsity in [0, 1), got None")
    else:
        target = checked_sparsity(sparsity)
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
        allocation=allocation,
    )
    if data is not None and recomputations > 1:
        require_rereadable(data, f"recomputations={recomputations}")
    if data is not None and recalibrate_batchnorm and pruner.curvature.observes:
        require_rereadable(data, "recalibrate_batchnorm=True")
    with _restored_on_error(pruner._parameters()):
        for done in range(1, recomputations + 1):
            pruner.estimate(data, loss_fn)
            pruner.prune_to(_part_way(target, done / recomputations))
        return pruner.finalize()


def _part_way(target: Sparsity, part: float) -> Sparsity:
    """The sparsity whose density lies geometrically between 1 and the target's."""
    if part == 1:
        return target
    if isinstance(target, Mapping):
        return {name: 1 - (1 - sparsity) ** part for name, sparsity in target.items()}
    return 1 - (1 - target) ** part


def _check_pattern(pattern: str) -> None:
    if pattern == "unstructured":
        return
    known = isinstance(pattern, str) and re.fullmatch(r"([0-9]+):([0-9]+)|block0*[1-9][0-9]*", pattern)
    if not known or (known[1] and not 0 < int(known[2]) >= int(known[1])):
        raise ValueError(
            f"expected pattern to be 'unstructured', n:m such as '2:4' or blockN such as 'block4', got {pattern!r}"
        )
    raise NotImplementedError(f"pattern={pattern!r} is not in this version yet, only 'unstructured'")


@contextlib.contextmanager
def _restored_on_error(weights: Iterable[nn.Parameter]) -> Iterator[None]:
    """The parameters as they were, should anything be raised."""
    before = [(weight, weight.detach().clone()) for weight in weights]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for weight, value in before:
                weight.copy_(value)
        raise
