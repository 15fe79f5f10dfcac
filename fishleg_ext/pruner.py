"""The loop: observe, score, select, compensate, mask. The only file that sees every stage."""

import contextlib
import copy
import functools
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fishleg_ext.common.arguments import checked_count, checked_function, checked_sparsity, checked_type
from fishleg_ext.curvature import Curvature, make_curvature
from fishleg_ext.estimate import Estimate, Stopwatch
from fishleg_ext.observation.batches import require_rereadable
from fishleg_ext.observation.batchnorm import recalibrate_batchnorm
from fishleg_ext.observation.likelihoods import Likelihood, LossFunction
from fishleg_ext.ops import use_impl
from fishleg_ext.ops.dispatch import check_impl
from fishleg_ext.pruning.compensation import exact_update, simultaneous_update
from fishleg_ext.pruning.costs import Costs, total_cost
from fishleg_ext.pruning.first_order import FirstOrderStep, first_order_step
from fishleg_ext.pruning.fixed_order import fixed_order_prune
from fishleg_ext.pruning.saliency import exact_costs, simultaneous_costs
from fishleg_ext.pruning.selection import select
from fishleg_ext.schedule import Schedule
from fishleg_ext.sparsity.budget import Budget, Sparsity, check_names
from fishleg_ext.sparsity.flops import weight_uses
from fishleg_ext.sparsity.masks import Masks
from fishleg_ext.sparsity.parameters import ParameterChoice, biases_of, check_weight, choose_parameters
from fishleg_ext.sparsity.patterns import Pattern

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
            "damping_raised" (name -> blocks) and "seconds" (stage -> seconds); with first_order also
            "first_order_share", how much of the step was taken. JSON-able.
    """

    masks: dict[str, Tensor] = field(repr=False)
    sparsity: float
    layer_sparsity: dict[str, float] = field(repr=False)
    predicted_loss_increase: float
    history: list[dict[str, Any]] = field(repr=False)


class Pruner:
    """Prunes a model step by step: `estimate` the curvature, `prune_to` a sparsity, train if you like, and again.

    A pruner holds masks and curvature; the model is changed by `prune_to`, `step`, `apply_masks` and `finalize` alone.

    Args, beside those of `prune`:
        schedule: step -> sparsity or None, such as `fishleg_ext.schedule.Cubic(...)`, that `step` follows. With one
            curvature="fishleg" carries its estimate over from one pruning to the next.
        data, loss_fn: what `step` estimates the curvature from, as in `prune`; may be given to `estimate` instead.
        masks: to begin with, name -> bool tensor, True = kept: those of an earlier pruning (`PruneResult.masks`), and
            so, unless `params` says otherwise, which parameters. Weights that are not zero yet are left alone until an
            attached optimizer's step, or `apply_masks`.
        refine_grads: gradients of every estimate but the first, where the curvature carries over what it has learned;
            None is `num_grads`.

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
        min_density: float = 0.0,
        first_order: Union[bool, float] = False,
        schedule: Optional[Schedule] = None,
        data: Optional[Iterable[Any]] = None,
        loss_fn: LossFunction = nn.functional.cross_entropy,
        refine_grads: Optional[int] = None,
        masks: Optional[Mapping[str, Tensor]] = None,
    ) -> None:
        checked_type("model", model, nn.Module, "an nn.Module")
        self.curvature = make_curvature(curvature, block_size=block_size, damping=damping)
        if schedule is not None and curvature == "fishleg":
            self.curvature.carry_over = self.curvature.default_num_grads
        self.saliency = self.curvature.default_saliency if saliency is None else saliency
        if self.saliency not in SALIENCIES:
            raise ValueError(f"expected saliency to be one of {', '.join(SALIENCIES)}, got {saliency!r}")
        self.pattern = Pattern.parse(pattern)
        check_impl(impl)
        self.impl, self.seed, self.progress = impl, seed, progress
        self.recalibrate_batchnorm = recalibrate_batchnorm
        self.model = model
        if masks is not None:
            checked_type("masks", masks, Mapping, "a dict of tensors")
            params = list(masks) if params is None else params
        self.weights = self._fitting(choose_parameters(model, params), chosen=params is not None)
        self._biases = biases_of(model, self.weights)
        self._masks = Masks(self.weights)
        if masks is not None:
            self._masks.set(masks)
            if odd := [name for name, mask in masks.items() if not self.pattern.allows(mask)]:
                raise ValueError(f"expected masks of pattern={pattern!r}, got others of {', '.join(odd)}")
        self.history: list[dict[str, Any]] = []
        self._timed = Stopwatch()
        self._damping_raised: dict[str, int] = {}
        # Of the last estimate, for BatchNorm and the next step, or given for all.
        self._data, self._loss_fn = _checked_source(data, loss_fn)
        self.schedule, self._step = schedule, 0
        if schedule is not None:
            checked_function("schedule", schedule, "a function of the step")
            if data is not None:
                require_rereadable(data, "each step that prunes")
            if isinstance(scope, Mapping):
                raise ValueError("expected no dict of sparsities as scope with a schedule, which says how many go")
        if not isinstance(first_order, (bool, float, int)) or not 0 <= first_order <= 1:
            raise ValueError(f"expected first_order to be a bool or a share of the step in [0, 1], got {first_order!r}")
        self.first_order = first_order if isinstance(first_order, bool) else float(first_order)
        if first_order and self.curvature.observes == {"inputs"}:
            raise ValueError(
                f"expected no first_order with {type(self.curvature).__name__}, which knows the errors of outputs, "
                "not the loss"
            )
        self._first = FirstOrderStep()
        self.refine_grads = None if refine_grads is None else checked_count("refine_grads", refine_grads)
        if self.refine_grads and not self.curvature.carry_over:
            raise ValueError(
                f"expected no refine_grads with {type(self.curvature).__name__} that carries nothing over from one "
                "estimate to the next"
            )
        self._handles: list[RemovableHandle] = []
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
            progress=progress,
            timed=self._timed,
        )
        self._estimate = estimate(self.curvature, stage="observation")
        self._allocation: Optional[Estimate] = None
        if allocation is not None:
            if self.pattern.m:
                raise ValueError(f"expected no allocation with pattern={pattern!r}, where all parameters lose as much")
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
        self._check_blocks()
        self._budget = Budget(self.scope, self.pattern, checked_sparsity(min_density, "min_density"))
        self._uses: dict[str, float] = {}  # of each weight of a parameter, with scope="flops"
        final = getattr(schedule, "final_sparsity", None)
        if final is not None:
            self._budget.check_final(final, self._masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor, True = kept; copies."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    def estimate(
        self,
        data: Optional[Iterable[Any]] = None,
        loss_fn: Optional[LossFunction] = None,
    ) -> None:
        """Estimate the curvature of the model as it is now, forgetting earlier estimates, or carrying them over.

        Where `max_memory` splits the estimate it is `prune_to` that reads the data, twice for each part but the last;
        with sequential inputs it reads it once for each parameter.

        Args:
            data: iterable of (inputs, targets) batches; may be None where the curvature observes nothing.
            loss_fn: (outputs, targets) -> scalar, the mean over the batch. What is None is as the last time, or as
                given to the constructor.

        Raises:
            ValueError: no data, data that can be read only once where it is needed again, labels="model" without a
                likelihood, weights or gradients with NaN or inf, single-weight scores of layerwise curvature where
                weights are pruned already.
            RuntimeError: parameters of the model were replaced since this pruner was made.
        """
        data, loss_fn = _checked_source(
            self._data if data is None else data, self._loss_fn if loss_fn is None else loss_fn
        )
        self._check_parameters()
        self._warn_of_revived()
        cleared = self.curvature.masked or self.curvature.maskable
        if self.saliency == "simultaneous" and not cleared and any(self._masks.num_pruned().values()):
            raise ValueError(
                f"expected saliency='exact' or 'fixed_order' where weights are pruned already: single-weight scores of "
                f"{type(self.curvature).__name__} would count on these to make up for others"
            )
        readers = [estimate for estimate in self._estimates() if estimate.curvature.observes]
        if data is not None and len(readers) > 1:
            require_rereadable(data, "allocation= reads it once more")
        if self.schedule is not None and data is not None:
            require_rereadable(data, "each step that prunes")
        if self.scope == "flops":
            if data is None:
                raise ValueError("scope='flops' needs data, got None")
            require_rereadable(data, "scope='flops' reads it once more")
            self._uses = weight_uses(self.model, data, self.weights, seed=self.seed)
        self._timed.seconds, self._damping_raised = {}, {}
        seed = self.seed + 2**20 * self._step  # other samples of shuffled data, and other labels, in each step
        with self._implementation():
            for estimate in self._estimates():
                refine_grads = self.refine_grads if self.history and estimate.carries_over else None
                estimate.begin(data, loss_fn, self._masks, num_grads=refine_grads, seed=seed)
            self._first = FirstOrderStep()
            if self.first_order:
                self._first = self._first_order_step(data, loss_fn, seed)
        self._data, self._loss_fn = data, loss_fn

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
        num_pruned = self._budget.num_pruned(sparsity, self._masks)
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
        increase, share = increase - self._first.gain, self._first.share
        self._first = FirstOrderStep()  # the weights are in the minimum of the quadratic model, as far as they may be
        for estimate in self._estimates():
            if len(estimate.groups) > 1:
                estimate.release()  # the parts not held would be estimated on the weights of now
        self._record(increase, share)
        return self._result()

    def _first_order_step(self, data: Optional[Iterable[Any]], loss_fn: LossFunction, seed: int) -> FirstOrderStep:
        if data is None:
            raise ValueError("first_order needs data, got None")
        require_rereadable(data, "first_order= reads it twice more")
        with self._timed("first order"), torch.no_grad():
            return first_order_step(
                self._estimate,
                self._masks,
                data,
                loss_fn,
                share=None if self.first_order is True else float(self.first_order),
                dead_move=not self.curvature.masked,
                seed=seed,
                progress=self.progress,
            )

    def _start(self, names: list[str]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and biases that costs are counted from: as they are, or after the first-order step."""
        weights, biases = self._estimate.weights(names), self._estimate.biases(names)
        return self._first.taken({name: name for name in names}, weights), self._first.taken(self._biases, biases)

    def _allocated(self, estimate: Estimate, num_pruned: Union[int, Mapping[str, int]]) -> dict[str, int]:
        """How many weights each parameter loses where all of them compete under another curvature."""
        costs: dict[str, Costs] = {}
        for group in estimate.groups:
            estimate.hold(group)  # which is timed
            with self._timed("allocation"):
                weights = estimate.weights(group)
                costs |= self._costs(estimate, estimate.curvature.default_saliency, weights)
            self._damping_raised |= estimate.curvature.damping_raised
        return {name: int((~mask).sum()) for name, mask in self._select(costs, num_pruned).items()}

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
                    costs |= self._costs(estimate, self.saliency, self._start(group)[0])
                self._damping_raised |= self.curvature.damping_raised
            with self._timed("selection"):
                chosen = self._select(costs, num_pruned)
        costs_add_up = self.saliency == "exact" and self.curvature.block_diagonal
        for group in reversed(groups):  # the last one is still held
            estimate.hold(group)
            show = self.progress
            with self._timed("compensation"):
                weights, biases = self._start(group)
                if self.saliency == "fixed_order":
                    assert isinstance(num_pruned, Mapping)
                    alive = {name: self._masks[name] for name in group}
                    kept, moved = fixed_order_prune(
                        self.curvature, weights, alive, num_pruned, biases, self.pattern, progress=show
                    )
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

    def step(self) -> bool:
        """Prune as far as the schedule says, if it says so of this step; call it once in each training step, or epoch.

        Estimates on the data and the loss of the last estimate, or those given to the constructor. A sparsity below
        what is pruned already prunes nothing.

        Returns:
            whether weights were pruned.

        Raises:
            RuntimeError: there is no schedule.
            ValueError: what `estimate` and `prune_to` raise; the step is not counted then.
        """
        if self.schedule is None:
            raise RuntimeError("expected a Pruner with a schedule; without one call estimate and prune_to")
        sparsity = self.schedule(self._step)
        due = sparsity is not None and self._budget.is_beyond(sparsity, self._masks)
        if due:
            self.estimate()
            self.prune_to(sparsity)
            for estimate in self._estimates():
                if not estimate.carries_over:
                    estimate.release()  # the next step has its own
        self._step += 1
        return due

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """From now on zero pruned weights, and what the optimizer keeps for them, after each of its steps.

        Momentum, Adam's moments and weight decay so revive none. A hook of the optimizer: the model and its state dict
        are as they were. It follows the masks as they change.

        Args:
            optimizer: of some of the pruned parameters at least. Each that is made later needs a call of its own.

        Returns:
            a handle; its `remove()` ends this, as `finalize` does.

        Raises:
            ValueError: it is an optimizer of none of the pruned parameters.
            TypeError: it is no optimizer.
        """
        checked_type("optimizer", optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        owned = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(weight) in owned for weight in self.weights.values()):
            raise ValueError(
                "expected an optimizer of the pruned parameters, got one of none of them; was the model copied, or its "
                "parameters replaced, after the optimizer or the Pruner was made?"
            )

        def keep_zeros(stepped: torch.optim.Optimizer, *_: Any) -> None:
            with self._implementation(), torch.no_grad():
                self._masks.apply(stepped.state)

        handle = optimizer.register_step_post_hook(keep_zeros)
        self._handles.append(handle)
        return handle

    def apply_masks(self) -> None:
        """Zero the pruned weights of the model, as after an optimizer step that revived them."""
        with self._implementation():
            self._masks.apply()

    def finalize(self) -> PruneResult:
        """Leave the model a plain one: zeros in the weights, no hooks; BatchNorm recalibrated if that was asked for.

        Training that goes on afterwards needs `attach` again. Warns if pruned weights were not zero, and if the
        schedule, or a pattern of n:m, is not complete.
        """
        self._warn_of_revived()
        self._warn_of_incomplete()
        self.apply_masks()
        if self.recalibrate_batchnorm:
            data = () if self._data is None else self._data
            recalibrate_batchnorm(self.model, data, seed=self.seed, progress=self.progress)
        for handle in self._handles:
            handle.remove()
        return self._result()

    def state_dict(self) -> dict[str, Any]:
        """Masks (packed), the curvature if it is held, history, and the schedule's position, which seeds what is drawn.

        Of tensors, numbers, strings, lists and dicts alone: for `fishleg_ext.checkpoint.save`, or `torch.save` and to
        load with `weights_only`.
        """
        return {
            "pattern": self.pattern.name,
            "masks": self._masks.state_dict(),
            **self._estimate.state_dict(),
            "allocation": None if self._allocation is None else self._allocation.state_dict(),
            "history": copy.deepcopy(self.history),
            "step": self._step,
            "first_order": self._first._asdict(),
            "uses": dict(self._uses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, for a pruner of the same model made with the same arguments.

        The model's own weights are not part of the state; load them beside it. Nor are settings, such as damping:
        those of this pruner hold.

        Raises:
            ValueError: the state is of other parameters, shapes, curvature models or another pattern; nothing is
                changed then.
        """
        missing = {
            "pattern",
            "masks",
            "masks_at_estimate",
            "model",
            "curvature",
            "held",
            "used_grads",
            "allocation",
            "history",
            "step",
            "first_order",
            "uses",
        } - state.keys()
        if missing:
            raise ValueError(f"expected the state of a Pruner, but it has no {', '.join(sorted(missing))}")
        if state["pattern"] != self.pattern.name:
            raise ValueError(f"expected the state of pattern={self.pattern.name!r}, got one of {state['pattern']!r}")
        if (state["allocation"] is None) != (self._allocation is None):
            raise ValueError("expected the state of a Pruner with the same allocation")
        masks = Masks(self.weights)
        masks.load_state_dict(state["masks"])
        first = FirstOrderStep(**state["first_order"])
        moving = {p: self.model.get_parameter(p) for p in [*self.weights, *self.curvature.biases.values()]}
        for name, own in moving.items() if first.step else ():
            if name not in first.step or first.step[name].shape != own.shape or len(first.step) != len(moving):
                raise ValueError(f"expected a first-order step of {', '.join(moving)}, got {', '.join(first.step)}")
        first = first._replace(step={name: step.to(moving[name].device) for name, step in first.step.items()})
        if state["uses"] and state["uses"].keys() != self.weights.keys():
            raise ValueError(f"expected uses of {', '.join(self.weights)}, got {', '.join(state['uses'])}")
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
        self._step = int(state["step"])
        self._first, self._uses = first, dict(state["uses"])

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

    def _warn_of_revived(self) -> None:
        if moved := self._masks.num_revived():
            pruned = sum(self._masks.num_pruned().values())
            warnings.warn(
                f"{moved} of {pruned} pruned weights are not zero: was an optimizer not attached? attach(optimizer) "
                "keeps them at zero while it trains the others; apply_masks() sets them to zero now",
                stacklevel=3,
            )

    def _warn_of_incomplete(self) -> None:
        wanted, sparsity = getattr(self.schedule, "final_sparsity", None), self._masks.sparsity()
        if wanted is not None and self._budget.is_beyond(wanted, self._masks):
            warnings.warn(f"finalized at a sparsity of {sparsity:.4g}, the schedule ends at {wanted}", stacklevel=3)
        pruned = {name: count for name, count in self._masks.num_pruned().items() if self.pattern.m and count}
        partly = [n for n, count in pruned.items() if count != self.pattern.most_pruned(self.weights[n].numel())]
        if partly:
            warnings.warn(f"only a part of {', '.join(partly)} is {self.pattern.name}", stacklevel=3)

    def _check_scope(self) -> None:
        if isinstance(self.scope, Mapping):
            check_names(self.scope, self._masks)
            for name, sparsity in self.scope.items():
                checked_sparsity(sparsity, f"sparsity of {name}")
        elif self.scope not in ("global", "flops", "layer"):
            raise ValueError(
                f"expected scope to be 'global', 'flops', 'layer' or a dict of sparsities, got {self.scope!r}"
            )
        elif self.scope != "layer" and self._allocation is None:
            if self.saliency == "fixed_order":
                raise ValueError(
                    "expected scope='layer', a dict of sparsities or allocation= with saliency='fixed_order'"
                )
            if self.curvature.sequential:
                raise ValueError("expected scope='layer', a dict of sparsities or allocation= with sequential inputs")

    def _fitting(self, weights: dict[str, nn.Parameter], *, chosen: bool) -> dict[str, nn.Parameter]:
        """Those whose fan-in the pattern divides; an error where users chose others themselves."""
        misfits = self.pattern.misfits(weights)
        if not misfits:
            return weights
        listed = ", ".join(f"{name} (fan-in {fan_in})" for name, fan_in in misfits.items())
        multiple = f"the fan-in to be a multiple of {self.pattern.unit} with pattern={self.pattern.name!r}"
        if chosen or len(misfits) == len(weights):
            raise ValueError(f"expected {multiple}, got {listed}")
        warnings.warn(f"expected {multiple}; these stay dense: {listed}", stacklevel=4)
        return {name: weight for name, weight in weights.items() if name not in misfits}

    def _check_blocks(self) -> None:
        """Patterns lie within the blocks of exact elimination."""
        pairs = [(estimate.curvature, estimate.curvature.default_saliency) for estimate in self._estimates()]
        pairs[-1] = (self.curvature, self.saliency)
        for curvature, saliency in pairs:
            for name, weight in self.weights.items() if saliency != "simultaneous" else ():
                size = curvature.layout(name, weight.detach()).block_size
                if size % self.pattern.unit:
                    raise ValueError(
                        f"expected blocks of a multiple of {self.pattern.unit} weights with "
                        f"pattern={self.pattern.name!r}, but {type(curvature).__name__} has blocks of {size} in {name}"
                    )

    def _costs(self, estimate: Estimate, saliency: str, weights: Mapping[str, Tensor]) -> dict[str, Costs]:
        masks = {name: self._masks[name] for name in weights}
        if saliency == "simultaneous":
            return simultaneous_costs(estimate.curvature, weights, masks, self.pattern)
        dead_first = not estimate.knows_as_dead(self._masks)
        return exact_costs(
            estimate.curvature, weights, masks, self.pattern, dead_first=dead_first, progress=self.progress
        )

    def _select(self, costs: Mapping[str, Costs], num_pruned: Union[int, Mapping[str, int]]) -> dict[str, Tensor]:
        limited = self._budget.most_pruned(self._masks) if self._budget.min_density else {}
        return select(costs, num_pruned, savings=self._uses, most_pruned=limited)

    def _implementation(self) -> contextlib.AbstractContextManager[None]:
        """The one asked for; "auto" leaves a `use_impl` around this in force."""
        return contextlib.nullcontext() if self.impl == "auto" else use_impl(self.impl)

    def _record(self, increase: float, share: float) -> None:
        self.history.append(
            {
                "sparsity": self._masks.sparsity(),
                "layer_sparsity": self._masks.layer_sparsity(),
                "num_grads": self._estimate.used_grads,
                "predicted_loss_increase": increase,
                **({"first_order_share": share} if self.first_order else {}),
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
    min_density: float = 0.0,
    first_order: Union[bool, float] = False,
) -> PruneResult:
    """Prune a model in place, in one call. If anything is raised, the model is as before the call.

    Args:
        model: any module.
        data: iterable of (inputs, targets) batches; inputs a tensor, a tuple (positional) or a dict (keywords). May
            be None with curvature="identity".
        loss_fn: (outputs, targets) -> scalar, the mean over the batch.
        sparsity: pruned weights over all weights, in [0, 1): exactly round(sparsity * n) become zero, of all
            n weights or, with scope="layer", of each parameter's. With pattern="n:m" it is 1 - n/m, and may be omitted.
        curvature: "identity" (magnitude), "diagonal", "block" (WoodFisher, oBERT, CAP), "low_rank" (M-FAC),
            "layerwise" (OBC), "kronecker" (K-FAC), "fishleg", or a `fishleg_ext.curvature.Curvature`. Under "kronecker"
            and "fishleg" the biases of the pruned layers move with the weights; no other parameters ever change.
        saliency: "exact" (greedy elimination in blocks), "simultaneous" (single-weight formula), or "fixed_order"
            (SparseGPT: column after column; not with scope="global"). None is the curvature's default: simultaneous for
            identity, diagonal and low_rank, exact for the others.
        scope: "global" (one threshold for all parameters), "flops" (the same, for costs over how often a sample's
            forward pass uses the weight), "layer" (the same sparsity in each), or a dict name -> sparsity; parameters
            not in it stay dense. None is the curvature's default: "layer" for layerwise, "global" for the others.
        pattern: "unstructured"; "n:m", such as "2:4", keeps n of each m consecutive weights along the fan-in of each
            output; "blockN" keeps or prunes N consecutive weights together, the nearest multiple of N to sparsity.
            Parameters whose fan-in is no multiple of m or N stay dense, with a warning, unless `params` names them.
        params: a name, "re:..." (searched for in names), a list of these, or a predicate (name, parameter) -> bool.
            None is the weight of every Linear and Conv layer (nn.MultiheadAttention's in_proj_weight is none of them),
            whether or not it requires a gradient.
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
        min_density: each parameter keeps at least this fraction of its weights, and others lose more; an error where
            sparsity leaves less to a parameter, or to all of them.
        first_order: count the gradient of the loss, too, which is not zero where training has not ended (WoodTaylor):
            the weights also take part of the step to where the curvature says the loss is lowest. A number is which
            part, 1.0 as published; True looks for the part at which the loss on the same samples is lowest, and takes
            half of that. Reads the data twice more.

    Raises:
        ValueError, TypeError: an argument that does not fit; empty data; NaN or inf in weights or gradients, by
            parameter; one-shot data that is needed more than once.
        CurvatureError: a Fisher matrix that cannot be inverted, by parameter.

    >>> model = nn.Linear(4, 2)
    >>> data = [(torch.randn(16, 4), torch.randint(2, (16,)))]
    >>> prune(model, data, sparsity=0.75, num_grads=16, progress=False).sparsity
    0.75
    """
    recomputations = checked_count("recomputations", recomputations)
    target: Optional[Sparsity] = Pattern.parse(pattern).sparsity if sparsity is None else sparsity
    if isinstance(scope, Mapping):
        if sparsity is not None:
            raise ValueError("expected either sparsity or a dict of sparsities as scope, got both")
        target = scope
    elif target is None:
        raise ValueError("expected a sparsity in [0, 1), got None")
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
        min_density=min_density,
        first_order=first_order,
        loss_fn=loss_fn,
    )
    pruner._budget.check_final(target, pruner._masks)
    if data is not None and recomputations > 1:
        require_rereadable(data, f"recomputations={recomputations}")
    if data is not None and recalibrate_batchnorm and pruner.curvature.observes:
        require_rereadable(data, "recalibrate_batchnorm=True")
    with _restored_on_error(pruner._parameters()):
        for done in range(1, recomputations + 1):
            pruner.estimate(data, loss_fn)
            pruner.prune_to(_part_way(target, done / recomputations))
        return pruner.finalize()


def _checked_source(data: Optional[Iterable[Any]], loss_fn: LossFunction) -> tuple[Any, LossFunction]:
    """Both, if they are what they should be."""
    if data is not None and not hasattr(data, "__getitem__"):  # which is enough to be iterated over
        checked_type("data", data, Iterable, "an iterable of batches")
    return data, checked_function("loss_fn", loss_fn, "a function of outputs and targets")


def _part_way(target: Sparsity, part: float) -> Sparsity:
    """The sparsity whose density lies geometrically between 1 and the target's."""
    if part == 1:
        return target
    if isinstance(target, Mapping):
        return {name: 1 - (1 - sparsity) ** part for name, sparsity in target.items()}
    return 1 - (1 - target) ** part


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
