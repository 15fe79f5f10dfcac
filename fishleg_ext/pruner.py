"""The loop: observe, score, select, compensate, mask. The only file that sees every stage."""

import contextlib
import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fishleg_ext.common.arguments import checked_count, checked_function, checked_type
from fishleg_ext.common.grad_mode import outside_inference_mode
from fishleg_ext.common.optimizers import Handles, after_each_step
from fishleg_ext.common.state import Restorer, of_today, state_entry
from fishleg_ext.config import PruneConfig, config_of, documented, with_settings
from fishleg_ext.curvature import Curvature, Estimate
from fishleg_ext.estimator import Estimator, Stopwatch
from fishleg_ext.observation.batches import BatchFunction, checked_source, require_rereadable
from fishleg_ext.observation.batchnorm import recalibrate_batchnorm
from fishleg_ext.observation.blocks import Blocks, find_blocks
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.ops import use_impl
from fishleg_ext.pruning.first_order import FirstOrderStep, first_order_step
from fishleg_ext.pruning.solvers import SOLVERS
from fishleg_ext.result import PruneResult
from fishleg_ext.round import Round
from fishleg_ext.schedule import Schedule
from fishleg_ext.sparsity.budget import Budget, Sparsity, check_names
from fishleg_ext.sparsity.flops import flops_per_weight
from fishleg_ext.sparsity.masks import Masks
from fishleg_ext.sparsity.parameters import (
    biases_of,
    check_weights,
    choose_parameters,
    orientations_of,
    own_names,
    why_dense,
)
from fishleg_ext.sparsity.patterns import Pattern

STATE = ("pattern", "masks", "estimate", "allocation", "history", "step", "first_order", "flops_per_weight")


@documented
class Pruner:
    """Prunes a model step by step: `estimate` the curvature, `prune_to` a sparsity, train if you like, and again.

    A pruner holds masks and curvature; the model is changed by `prune_to`, `step`, `apply_masks` and `finalize` alone.

    Args:
        model: any module.
        config: a `PruneConfig`; the keywords below may stand in its place, or change some of its settings. Its
            sparsity is what `prune_to` prunes to when it is given none; its recomputations must be 1.
        schedule: step -> sparsity or None, such as `fishleg_ext.schedule.Cubic(...)`, that `step` follows. FishLeg's
            `carry_over` then has another default.
        data: what `step` estimates the curvature from, as in `prune`; may be given to `estimate` instead.
        loss_fn: the loss of `data`, as in `prune`.
        batch_fn: what makes (inputs, targets) of each batch of data, here and in `estimate`, as in `prune`.
        refine_grads: gradients of every estimate but the first, where the curvature starts from the previous estimate;
            None is `num_grads`.
        masks: to begin with, name -> bool tensor, True = kept: those of an earlier pruning (`PruneResult.masks`), and
            so, unless `params` says otherwise, which parameters. Weights that are not zero yet are left alone until an
            attached optimizer's step, or `apply_masks`.
    {settings}

    Examples:
        >>> model = nn.Linear(4, 2)
        >>> data = [(torch.randn(16, 4), torch.randint(2, (16,)))]
        >>> pruner = Pruner(model, curvature="block", num_grads=16, progress=False)
        >>> pruner.estimate(data, nn.functional.cross_entropy)
        >>> pruner.prune_to(0.5).sparsity
        0.5
    """

    @outside_inference_mode
    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        *,
        schedule: Schedule | None = None,
        data: Iterable[Any] | None = None,
        loss_fn: LossFunction | None = nn.functional.cross_entropy,
        batch_fn: BatchFunction | None = None,
        refine_grads: int | None = None,
        masks: Mapping[str, Tensor] | None = None,
        **settings: Any,
    ) -> None:
        self.model = checked_type("model", model, nn.Module, "an nn.Module")
        if made := [name for name, parameter in model.named_parameters() if parameter.is_inference()]:
            raise ValueError(
                f"expected parameters that can change, but {made[0]} was made in torch.inference_mode(); make the "
                "model outside of it"
            )
        self.config = config_of(config, settings)
        self.pattern = Pattern.parse(self.config.pattern)
        params = self.config.params
        if masks is not None:
            checked_type("masks", masks, Mapping, "a dict of tensors")
            masks = own_names(model, masks)
            params = list(masks) if params is None else params
        chosen = choose_parameters(model, params)
        self.blocks: Blocks | None = None
        outside: dict[str, str] = {}
        if given := self.config.block_by_block:
            self.blocks = blocks = find_blocks(model, chosen, given if isinstance(given, str) else None)
            why = f"it lies outside of the blocks of {blocks.name}"
            outside = {name: why for name in chosen if blocks.of(name) is None}
            if outside and (params is not None or len(outside) == len(chosen)):
                raise ValueError(f"expected parameters within the blocks of {blocks.name}, got {', '.join(outside)}")
            chosen = {name: p for name, p in chosen.items() if name not in outside}
        self._orientations = orientations_of(model, chosen, channels_last=bool(self.pattern.m))
        shapes = {name: orientation.matrix_shape for name, orientation in self._orientations.items()}
        fitting = self.pattern.fitting(shapes, chosen=params is not None)
        self.weights = {name: chosen[name] for name in fitting}
        self._dense = why_dense(model, chosen, by_default=params is None)
        self._dense |= outside
        self._dense |= {name: self.pattern.misfit(shapes[name]) for name in chosen if name not in fitting}
        self._biases = biases_of(model, self.weights)
        self._masks = Masks(self.weights)
        missing: dict[str, int] = {}
        if masks is not None:
            self._masks.set(masks)
            matrices = {name: self._orientations[name].to_matrix(mask) for name, mask in self._masks.items()}
            if unfit := [name for name, mask in matrices.items() if not self.pattern.allows(mask)]:
                raise ValueError(f"expected masks of pattern={self.pattern.name!r}, got others of {', '.join(unfit)}")
            missing = {name: self.pattern.num_missing(mask) for name, mask in matrices.items()}

        self._batch_fn = batch_fn
        self._data, self._loss_fn = checked_source(data, loss_fn, batch_fn)  # of the last estimate, or given for all
        self.schedule, self._step = schedule, 0
        recipe, allocation = self.config.recipes()
        if schedule is not None:
            checked_function("schedule", schedule, "a function of the step")
            if data is not None:
                require_rereadable(data, "each step that prunes")
            if isinstance(self.config.scope, Mapping):
                raise ValueError("scope={...} cannot be combined with schedule=: the schedule sets the sparsity")
            if self.config.sparsity is not None:
                raise ValueError(
                    f"sparsity={self.config.sparsity} of the config cannot be combined with schedule=: both say how "
                    "many weights"
                )
            recipe = recipe.with_schedule()
        recipe = recipe.with_saliency(self.config.saliency)
        self.refine_grads = None if refine_grads is None else checked_count("refine_grads", refine_grads)
        if self.refine_grads and not recipe.prior_weight:
            raise ValueError(
                f"refine_grads={refine_grads} cannot be combined with {type(recipe).__name__} that starts every "
                "estimate from scratch"
            )

        self.solver = self.config.solver_of(recipe)
        self.history: list[dict[str, Any]] = []
        self._timed = Stopwatch(next(iter(self.weights.values())).device)
        self.estimator = self._estimator(recipe, "observation", 1 if allocation is None else 2)
        self.allocator = None if allocation is None else self._estimator(allocation, "allocation", 2)
        matrices = self.estimator.oriented(self.estimator.weights(self.weights))
        self.solver.check_pattern(recipe, matrices, self.pattern)
        if allocation is not None:
            SOLVERS[allocation.default_saliency].check_pattern(allocation, matrices, self.pattern)
        scope = self.config.scope_of(recipe)
        if isinstance(scope, Mapping):
            scope = own_names(model, scope)
            check_names(scope, self._masks)
        if scope == "row":
            self.solver.check_rows(recipe, matrices)
        self._budget = Budget(scope, self.pattern, self.config.min_density, missing)
        if any(missing.values()):
            listed = ", ".join(f"{name} ({number} weights)" for name, number in missing.items() if number)
            if self.solver.sweeps:
                raise ValueError(
                    f"expected masks that keep at least {self.pattern.n} of each {self.pattern.m} with "
                    f"saliency={self.config.saliency!r}, got fewer in {listed}; take saliency='exact'"
                )
            warnings.warn(
                f"masks keep fewer than {self.pattern.n} of some {self.pattern.m}, which stay so: {listed}",
                stacklevel=3,
            )
        self._flops_per_weight: dict[str, float] = {}  # with scope="flops"
        self._first = FirstOrderStep()
        self._handles: list[RemovableHandle | Handles] = []
        self._restorer = Restorer()
        final = getattr(schedule, "final_sparsity", None)
        if final is not None:
            self._budget.check_final(final, self._masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool tensor, True = kept; copies."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    @property
    def curvature(self) -> Estimate[Any]:
        """The last estimate: `mul`, `diag`, `blocks`, `state_dict`; its settings are `curvature.recipe`."""
        return self.estimator.estimate

    def target(self) -> Sparsity:
        """Return the sparsity that the settings name, of all together or of each parameter.

        Raises:
            ValueError: they name none, or one that cannot be reached.
        """
        target: Sparsity | None = self.config.sparsity
        if isinstance(self.config.scope, Mapping):
            target = own_names(self.model, self.config.scope)
        elif target is None:
            target = self.pattern.sparsity
        if target is None:
            raise ValueError("expected a sparsity in [0, 1), got None")
        self._budget.check_final(target, self._masks)
        return target

    @outside_inference_mode
    def estimate(self, data: Iterable[Any] | None = None, loss_fn: LossFunction | None = None) -> None:
        """Estimate the curvature of the model as it is now, from scratch or starting from the previous estimate.

        Where `max_memory` splits the estimate it is `prune_to` that reads the data, twice for each part but the last;
        with sequential inputs it reads it once for each parameter.

        Args:
            data: iterable of (inputs, targets) batches; may be None where the curvature observes nothing.
            loss_fn: (outputs, targets) -> scalar, the mean over the batch. What is None is as the last time, or as
                given to the constructor, where loss_fn=None is the loss that the model returns.

        Raises:
            ValueError: no data, data that can be read only once where it is needed again, labels="model" without a
                likelihood, weights or gradients with NaN or inf, single-weight scores of layerwise curvature where
                weights are pruned already.
            RuntimeError: parameters of the model were replaced since this pruner was made.
        """
        data = self._data if data is None else checked_source(data, None, self._batch_fn)[0]
        loss_fn = self._loss_fn if loss_fn is None else checked_source(None, loss_fn)[1]
        self._check_parameters()
        self._masks.warn_of_revived()
        self.solver.check(self.estimator.recipe, any(self._masks.pruned_counts().values()))
        if data is not None:
            if sum(bool(estimator.recipe.observes) for estimator in self._estimators()) > 1:
                require_rereadable(data, "allocation= reads it once more")
            if self.schedule is not None:
                require_rereadable(data, "each step that prunes")
        if self._budget.scope == "flops":
            if data is None:
                raise ValueError("scope='flops' needs data, got None")
            require_rereadable(data, "scope='flops' reads it once more")
            self._flops_per_weight = flops_per_weight(self.model, data, self.weights, seed=self.config.seed)
        self._timed.seconds = {}
        seed = self.config.seed + 2**20 * self._step  # other samples of shuffled data, and other labels, in each step
        with self._implementation():
            for estimator in self._estimators():
                refine_grads = self.refine_grads if self.history and estimator.carries_over else None
                estimator.begin(data, loss_fn, self._masks, num_grads=refine_grads, seed=seed)
            self._first = FirstOrderStep()
            if self.config.first_order:
                self._first = self._first_order_step(data, loss_fn, seed)
        self._data, self._loss_fn = data, loss_fn

    @outside_inference_mode
    def prune_to(self, sparsity: Sparsity | None = None) -> PruneResult:
        """Prune weights, compensate with the others, and mask. If anything is raised, nothing is changed.

        Several calls after one estimate go on where the last one stopped, under the same curvature; where `max_memory`
        splits the estimate, or inputs are sequential, each call needs its own.

        Args:
            sparsity: pruned weights over all weights afterwards, in [0, 1), earlier ones included; or name -> sparsity
                of each parameter, the others staying as they are. None is what the settings name.

        Raises:
            RuntimeError: `estimate` was not called, or parameters of the model were replaced.
            ValueError: sparsity out of range or below what is pruned already, or weights with NaN or inf.
        """
        if not all(estimator.ready for estimator in self._estimators()):
            split = any(len(estimator.groups) > 1 for estimator in self._estimators())
            raise RuntimeError("call estimate(data, loss_fn) before " + ("each prune_to" if split else "prune_to"))
        if isinstance(sparsity, Mapping):
            sparsity = own_names(self.model, sparsity)
        counts = self._budget.counts(self.target() if sparsity is None else sparsity, self._masks)
        self._check_parameters()
        step = Round(
            self.estimator,
            self.allocator,
            self.solver,
            self._masks,
            self._budget,
            self._biases,
            self._flops_per_weight,
            self._first,
            self._timed,
            self.config.progress,
        )
        try:
            with self._implementation(), torch.no_grad(), self.restoring():
                masks, increase = step.prune(counts)
                self._masks.set(masks)
        except BaseException:
            if self.estimator.walk is not None:  # which has gone on with pruned blocks
                self.estimator.release()
            raise
        share = self._first.share
        self._first = FirstOrderStep()  # the weights are in the minimum of the quadratic model, as far as they may be
        for estimator in self._estimators():
            if len(estimator.groups) > 1 or estimator.walk is not None:
                estimator.release()  # the parts not held would be estimated on the weights of now
        self._record(increase, share, step.damping_raised)
        return self._result()

    def restoring(self) -> contextlib.AbstractContextManager[None]:
        """Put weights and biases back as they were should anything be raised within this block."""
        return self._restorer([*self.weights.values(), *map(self.model.get_parameter, self._biases.values())])

    def _estimator(self, recipe: Curvature, stage: str, sharing: int) -> Estimator:
        return Estimator(
            self.model,
            self.weights,
            self._biases,
            {name: self._orientations[name] for name in self.weights},
            recipe,
            max_memory=self.config.max_memory,
            sharing=sharing,
            progress=self.config.progress,
            timed=self._timed,
            stage=stage,
            blocks=None if stage == "allocation" else self.blocks,
            block_gradients=self.config.block_gradients,
            offload=self.config.offload,
        )

    def _first_order_step(self, data: Iterable[Any] | None, loss_fn: LossFunction | None, seed: int) -> FirstOrderStep:
        if data is None:
            raise ValueError("first_order needs data, got None")
        require_rereadable(data, "first_order= reads it twice more")
        share = self.config.first_order
        with self._timed("first order"), torch.no_grad():
            return first_order_step(
                self.estimator,
                self._masks,
                data,
                loss_fn,
                share=None if share is True else float(share),
                dead_move=not self.estimator.recipe.conditions_on_masks,
                seed=seed,
                progress=self.config.progress,
            )

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
        due = sparsity is not None and self._budget.exceeds(sparsity, self._masks)
        if due:
            self.estimate()
            self.prune_to(sparsity)
            for estimator in self._estimators():
                if not estimator.carries_over:
                    estimator.release()  # the next step has its own
        self._step += 1
        return due

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle | Handles:
        """From now on zero pruned weights, and what the optimizer keeps for them, after each of its steps.

        Momentum, Adam's moments and weight decay so revive none. A hook of the optimizer: the model and its state dict
        are as they were. It follows the masks as they change. `optim.FishLeg` takes its steps within them.

        Args:
            optimizer: of some of the pruned parameters at least; or what wraps one, as accelerate does. Each that is
                made later needs a call of its own, as does a copy, since PyTorch copies no hooks.

        Returns:
            a handle; its `remove()` ends this, as `finalize` does.

        Raises:
            ValueError: it is an optimizer of none of the pruned parameters.
            TypeError: it is no optimizer.
        """

        def keep_zeros(stepped: torch.optim.Optimizer, *_: Any) -> None:
            with self._implementation(), torch.no_grad():
                self._masks.apply(stepped.state)

        handle: RemovableHandle | Handles = after_each_step(optimizer, self.weights.values(), keep_zeros)
        if (follow := getattr(optimizer, "follow_masks", None)) is not None:
            within = follow(lambda: [(self.weights[name], mask) for name, mask in self._masks.items()])
            handle = Handles([handle, within])
        self._handles.append(handle)
        return handle

    def __getstate__(self) -> dict[str, Any]:
        """Leave hooks out, which are of optimizers that are not pickled or copied with this: `attach` to theirs."""
        return vars(self) | {"_handles": []}

    def apply_masks(self) -> None:
        """Zero the pruned weights of the model, as after an optimizer step that revived them."""
        with self._implementation():
            self._masks.apply()

    @outside_inference_mode
    def finalize(self) -> PruneResult:
        """Leave the model a plain one: zeros in the weights, no hooks; BatchNorm recalibrated if that was asked for.

        Training that goes on afterwards needs `attach` again. Warns if pruned weights were not zero, and if the
        schedule, or a pattern of n:m, is not complete.
        """
        self._masks.warn_of_revived()
        self._budget.warn_of_incomplete(getattr(self.schedule, "final_sparsity", None), self._masks)
        self.apply_masks()
        if self.config.recalibrate_batchnorm:
            data = () if self._data is None else self._data
            recalibrate_batchnorm(self.model, data, seed=self.config.seed, progress=self.config.progress)
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
            "estimate": self.estimator.state_dict(),
            "allocation": None if self.allocator is None else self.allocator.state_dict(),
            "history": copy.deepcopy(self.history),
            "step": self._step,
            "first_order": self._first.state_dict(),
            "flops_per_weight": dict(self._flops_per_weight),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned, for a pruner of the same model made with the same arguments.

        The model's own weights are not part of the state; load them beside it. Nor are settings, such as damping:
        those of this pruner hold.

        Raises:
            ValueError: the state is of other parameters, shapes, curvature models or another pattern; nothing is
                changed then.
        """
        state = of_today(state)
        entries = (state_entry(state, key, "a Pruner") for key in STATE)
        pattern, packed, estimate, allocation, history, step, first, flops = entries
        if pattern != self.pattern.name:
            raise ValueError(f"expected the state of pattern={self.pattern.name!r}, got one of {pattern!r}")
        if (allocation is None) != (self.allocator is None):
            raise ValueError("expected the state of a Pruner with the same allocation")
        masks = Masks(self.weights)
        masks.load_state_dict(packed)
        moving = {n: self.model.get_parameter(n) for n in [*self.weights, *self.estimator.known_biases.values()]}
        first_order = FirstOrderStep.of_state(first, moving)
        if flops and flops.keys() != self.weights.keys():
            raise ValueError(f"expected flops_per_weight of {', '.join(self.weights)}, got {', '.join(flops)}")
        estimator = self.estimator.loaded(estimate)
        allocator = None if self.allocator is None else self.allocator.loaded(allocation)
        history, step, flops = copy.deepcopy(list(history)), int(step), dict(flops)
        # Nothing fails from here on.
        self.estimator, self.allocator, self._masks, self._first = estimator, allocator, masks, first_order
        self.history, self._step, self._flops_per_weight = history, step, flops

    def _estimators(self) -> list[Estimator]:
        return [self.estimator] if self.allocator is None else [self.allocator, self.estimator]

    def _check_parameters(self) -> None:
        """The parameters are still those of the model, and finite."""
        named = dict(self.model.named_parameters())
        for name, weight in self.weights.items():
            if named.get(name) is not weight:
                raise RuntimeError(f"{name} was replaced in the model since this Pruner was made; make a new one")
        check_weights(self.weights)

    def _implementation(self) -> contextlib.AbstractContextManager[None]:
        """The one asked for; "auto" leaves a `use_impl` around this in force."""
        return contextlib.nullcontext() if self.config.impl == "auto" else use_impl(self.config.impl)

    def _record(self, increase: float, share: float, damping_raised: Mapping[str, int]) -> None:
        self.history.append(
            {
                "sparsity": self._masks.sparsity(),
                "layer_sparsity": self._masks.layer_sparsity(),
                "num_grads": self.estimator.used_grads,
                "predicted_loss_increase": increase,
                **({"first_order_share": share} if self.config.first_order else {}),
                "damping_raised": dict(damping_raised),
                "seconds": self._timed.seconds,
            }
        )
        self._timed.seconds = {}

    def _result(self) -> PruneResult:
        return PruneResult(
            masks=self.masks,
            sparsity=self._masks.sparsity(),
            layer_sparsity=self._masks.layer_sparsity(),
            predicted_loss_increase=sum(entry["predicted_loss_increase"] for entry in self.history),
            history=copy.deepcopy(self.history),
            dense=dict(self._dense),
            pattern=self.pattern.name,
            config=self.config,
        )


Pruner.__signature__ = with_settings(Pruner.__init__)  # type: ignore[attr-defined]
