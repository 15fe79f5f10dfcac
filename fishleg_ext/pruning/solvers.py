"""Chooses weights and compensates the others: by exact elimination, single scores, a fixed order, or ADMM."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from fishleg_ext.curvature import Curvature, Estimate
from fishleg_ext.pruning.admm import admm_masks
from fishleg_ext.pruning.compensation import exact_update, simultaneous_update
from fishleg_ext.pruning.costs import Costs
from fishleg_ext.pruning.fixed_order import fixed_order_prune
from fishleg_ext.pruning.saliency import exact_costs, simultaneous_costs
from fishleg_ext.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Problem:
    """Parameters that are to be pruned under one estimate of their curvature.

    Attributes:
        estimate: of the curvature of these parameters.
        weights: name -> the point about which the loss is expanded.
        biases: name of a weight -> its layer's bias at that point, where the curvature knows it.
        masks: name -> bool tensor, True = kept so far.
        pattern: that masks keep to.
        conditioned: whether the inverse is that of the weights kept so far.
        progress: whether to show progress bars.
    """

    estimate: Estimate[Any]
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    masks: Mapping[str, Tensor]
    pattern: Pattern
    conditioned: bool
    progress: bool = False


class Solver:
    """One way to choose and to compensate, which `prune` calls `saliency`.

    Attributes:
        sweeps: whether it chooses while it compensates (`sweep`), parameter by parameter, by given counts; else
            weights are chosen by `costs`, then `compensate` moves the others.
        in_blocks: whether it works within the blocks of the curvature, which patterns must then divide.
        costs_add_up: whether the step that it takes costs as much as `costs` of the pruned weights together, where the
            curvature has no entries between blocks.
    """

    sweeps: ClassVar[bool] = False
    in_blocks: ClassVar[bool] = True
    costs_add_up: ClassVar[bool] = False

    def check(self, recipe: Curvature, any_pruned: bool) -> None:
        """Raise ValueError where the model cannot answer what this solver asks, some weights being pruned already."""

    def check_pattern(self, recipe: Curvature, weights: Mapping[str, Tensor], pattern: Pattern) -> None:
        """Raise ValueError unless the pattern divides the blocks that the solver works in."""
        for name, weight in weights.items() if self.in_blocks else ():
            size = recipe.layout(name, weight.detach()).block_size
            if size % pattern.unit:
                raise ValueError(
                    f"expected blocks of a multiple of {pattern.unit} weights with "
                    f"pattern={pattern.name!r}, but {type(recipe).__name__} has blocks of {size} in {name}"
                )

    def check_rows(self, recipe: Curvature, weights: Mapping[str, Tensor]) -> None:
        """Raise ValueError unless rows hold whole blocks, so that a part of each row's weights can be chosen."""
        for name, weight in weights.items() if self.in_blocks else ():
            size, fan_in = recipe.layout(name, weight.detach()).block_size, math.prod(weight.shape[1:])
            if fan_in % size:
                raise ValueError(
                    f"expected blocks that divide the rows of {fan_in} weights of {name} with scope='row', but "
                    f"{type(recipe).__name__} has blocks of {size}"
                )

    def costs(self, problem: Problem) -> dict[str, Costs]:
        """Return what pruning each weight costs."""
        raise NotImplementedError

    def compensate(self, problem: Problem, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return weights, zero where a mask of `kept` is False, and biases, moved to compensate; by their own names."""
        raise NotImplementedError

    def sweep(self, problem: Problem, counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return masks with `counts` pruned weights, by name, and what `compensate` returns for them."""
        raise NotImplementedError


class Exact(Solver):
    """Greedy elimination within blocks, then the best joint compensation for all pruned weights of a block."""

    costs_add_up: ClassVar[bool] = True

    @override
    def costs(self, problem: Problem) -> dict[str, Costs]:
        return exact_costs(
            problem.estimate,
            problem.weights,
            problem.masks,
            problem.pattern,
            dead_first=not problem.conditioned,
            progress=problem.progress,
        )

    @override
    def compensate(self, problem: Problem, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return exact_update(problem.estimate, problem.weights, kept, problem.biases, progress=problem.progress)


class Simultaneous(Solver):
    """Scores and updates of single weights, added up as if each were pruned alone."""

    in_blocks: ClassVar[bool] = False

    @override
    def check(self, recipe: Curvature, any_pruned: bool) -> None:
        if any_pruned and not (recipe.conditions_on_masks or recipe.supports_mask):
            raise ValueError(
                f"expected saliency='exact' or 'fixed_order' where weights are pruned already: single-weight scores of "
                f"{type(recipe).__name__} would count on these to compensate"
            )

    @override
    def costs(self, problem: Problem) -> dict[str, Costs]:
        return simultaneous_costs(problem.estimate, problem.weights, problem.masks, problem.pattern)

    @override
    def compensate(self, problem: Problem, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return simultaneous_update(problem.estimate, problem.weights, kept, problem.biases)


class FixedOrder(Solver):
    """SparseGPT's sweep from the first column to the last."""

    sweeps: ClassVar[bool] = True

    @override
    def sweep(self, problem: Problem, counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return fixed_order_prune(
            problem.estimate,
            problem.weights,
            problem.masks,
            counts,
            problem.biases,
            problem.pattern,
            progress=problem.progress,
        )


class Admm(Solver):
    """Supports by ADMM, as ALPS finds them, then the best joint compensation."""

    sweeps: ClassVar[bool] = True

    @override
    def sweep(self, problem: Problem, counts: Mapping[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        estimate, weights, show = problem.estimate, problem.weights, problem.progress
        kept = admm_masks(estimate, weights, problem.masks, counts, problem.pattern, progress=show)
        return kept, exact_update(estimate, weights, kept, problem.biases, progress=show)


SOLVERS: dict[str, Solver] = {
    "exact": Exact(),
    "simultaneous": Simultaneous(),
    "fixed_order": FixedOrder(),
    "admm": Admm(),
}
