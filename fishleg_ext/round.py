"""One round of pruning, of all groups of parameters: costs, selection, compensation."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fishleg_ext.common.waiting import read_by_name
from fishleg_ext.estimator import Estimator, Stopwatch
from fishleg_ext.pruning.costs import Costs, total_cost
from fishleg_ext.pruning.first_order import FirstOrderStep
from fishleg_ext.pruning.selection import select
from fishleg_ext.pruning.solvers import SOLVERS, Problem, Solver
from fishleg_ext.sparsity.budget import Budget
from fishleg_ext.sparsity.masks import Masks


@dataclass
class Round:
    """What a round works with.

    Attributes:
        estimator: of the curvature under which weights are chosen and compensated.
        allocator: of another curvature, that says how many weights of each parameter are pruned; None where counts do.
        solver: how weights are chosen and compensated.
        masks: of now.
        budget: what limits the counts.
        bias_names: name of a weight -> name of its layer's bias.
        flops_per_weight: name -> operations that pruning a weight saves; empty where costs count as they are.
        first: a step that is subtracted from weights and biases first.
        timed: times the stages.
        progress: whether to show progress bars.
        damping_raised: name -> blocks whose damping had to be raised, once the round is done.
    """

    estimator: Estimator
    allocator: Estimator | None
    solver: Solver
    masks: Masks
    budget: Budget
    bias_names: Mapping[str, str]
    flops_per_weight: Mapping[str, float]
    first: FirstOrderStep
    timed: Stopwatch
    progress: bool
    damping_raised: dict[str, int] = field(default_factory=dict)

    def prune(self, counts: int | Mapping[str, int]) -> tuple[dict[str, Tensor], float]:
        """Prune the model, so far that `counts` weights are pruned in all, or of each parameter.

        Returns:
            name -> bool tensor, True = kept, and the cost of the step less what the first-order step gains, with the
            rise along what is left of the gradient where the step is not a whole one.
        """
        if self.allocator is not None:
            counts = self._allocated(self.allocator, counts)
        masks: dict[str, Tensor] = {}
        increase = -self.first.gain
        for part in self.estimator.parts:
            increase += self._prune(part, counts, masks)
        self.estimator.estimate.forget_kept()
        return masks, increase

    def _prune(self, groups: list[list[str]], counts: int | Mapping[str, int], masks: dict[str, Tensor]) -> float:
        """Prune these parameters of the model and add what is kept to `masks`; returns the cost of the step."""
        solver, costs = self.solver, dict[str, Costs]()
        chosen, updated, increase = dict[str, Tensor](), dict[str, Tensor](), 0.0
        for group in () if solver.sweeps else groups:
            costs |= self._costs(self.estimator, solver, group, "saliency")
        if not solver.sweeps:
            with self.timed("selection"):
                chosen = self._select(costs, counts)
        for group in reversed(groups):  # the last one is still held
            kept, moved, cost = self._compensated(group, counts, chosen, costs)
            chosen |= kept
            updated |= moved
            increase += cost
        finite = read_by_name({name: weight.isfinite().all() for name, weight in updated.items()})
        if bad := [name for name, yes in finite.items() if not yes]:
            raise ValueError(f"compensating for what was pruned of {bad[0]} gave NaN or inf; use more damping")
        for name, value in self.estimator.as_parameters(updated).items():
            self.estimator.model.get_parameter(name).copy_(value)
        masks |= self.estimator.as_parameters(chosen)
        return increase

    def _allocated(self, allocator: Estimator, counts: int | Mapping[str, int]) -> dict[str, int]:
        """Count the weights of each parameter that are pruned where all of them compete under another curvature."""
        costs: dict[str, Costs] = {}
        solver = SOLVERS[allocator.recipe.default_saliency]
        for group in allocator.groups:
            costs |= self._costs(allocator, solver, group, "allocation")
        allocator.estimate.forget_kept()
        pruned = read_by_name({name: (~mask).sum() for name, mask in self._select(costs, counts).items()})
        return {name: int(count) for name, count in pruned.items()}

    def _costs(self, estimator: Estimator, solver: Solver, group: list[str], stage: str) -> dict[str, Costs]:
        """Return the costs of one group; a function of its own, so that no estimate outlives the next one's start."""
        problem = self._problem(estimator, group)  # which times the observation
        with self.timed(stage), problem.estimate.checking_later():
            costs = solver.costs(problem)
        self.damping_raised |= problem.estimate.damping_raised
        return costs

    def _compensated(
        self,
        group: list[str],
        counts: int | Mapping[str, int],
        chosen: Mapping[str, Tensor],
        costs: Mapping[str, Costs],
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
        """Return masks of one group, its weights and biases compensated, and the cost of that; see `_costs`."""
        problem = self._problem(self.estimator, group)
        names = {key: self.bias_names.get(key, key) for key in problem.biases}
        before = {**problem.weights, **{names[key]: bias for key, bias in problem.biases.items()}}
        with self.timed("compensation"), problem.estimate.checking_later():
            if self.solver.sweeps:
                assert isinstance(counts, Mapping)
                kept, moved = self.solver.sweep(problem, counts)
            else:
                kept = {name: chosen[name] for name in group}
                moved = self.solver.compensate(problem, kept)
            moves = {name: x - before[name] for name, x in moved.items()}
            if self.solver.costs_add_up and self.estimator.recipe.block_diagonal:
                cost = total_cost({name: costs[name] for name in kept}, kept)
            else:
                cost = problem.estimate.step_cost(moves)
            cost += self.first.rise(self.estimator.as_parameters(moves))
        self.damping_raised |= problem.estimate.damping_raised
        return kept, moved, cost

    def _problem(self, estimator: Estimator, names: list[str]) -> Problem:
        """These parameters under their curvature, expanded about the weights, or after the first-order step."""
        estimate = estimator.hold(names)
        weights, biases = estimator.weights(names), estimator.biases(names)
        if estimator is self.estimator:
            weights, biases = self.first.subtract_from(weights), self.first.subtract_from(biases, self.bias_names)
        return Problem(
            estimate,
            estimator.oriented(weights),
            biases,
            estimator.oriented({name: self.masks[name] for name in names}),
            self.budget.pattern,
            conditioned=estimator.is_conditioned_on(self.masks),
            progress=self.progress,
        )

    def _select(self, costs: Mapping[str, Costs], counts: int | Mapping[str, int]) -> dict[str, Tensor]:
        limits = self.budget.max_counts(self.masks) if self.budget.min_density else None
        rows = None
        if self.budget.scope == "row":
            rows = {name: self.masks[name].numel() // self.estimator.orientation(name).fan_in for name in costs}
        return select(costs, counts, flops_per_weight=self.flops_per_weight, max_counts=limits, rows=rows)
