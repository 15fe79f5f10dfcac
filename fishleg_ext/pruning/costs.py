"""Holds what saliency hands to selection."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.waiting import read


@dataclass(frozen=True)
class Costs:
    """The costs of one parameter's weights.

    Attributes:
        layout: how the parameter is cut into K blocks of B.
        cost: [K, B]; +inf where unknown, NaN for weights that must be kept.
        alive: bool [K, B]; False for weights pruned before and for padding.
        rank: int32 [K, B], the order in which each block's weights must be pruned, as of `ops.obs_eliminate`; None
            where any order will do.
        group: consecutive weights that are pruned together; divides B.
    """

    layout: BlockLayout
    cost: Tensor
    alive: Tensor
    rank: Tensor | None = None
    group: int = 1

    def of_groups(self) -> "Costs":
        """Return the costs of whole groups in the place of weights: their joint costs, the layout that of groups."""
        if self.group == 1:
            return self
        layout = BlockLayout((self.layout.numel // self.group,), self.layout.block_size // self.group)
        split = (-1, self.group)
        alive = self.alive.unflatten(1, split).any(2)
        cost = torch.where(self.alive, self.cost, 0).unflatten(1, split).sum(2)
        rank = None if self.rank is None else torch.where(self.alive, self.rank, -1).unflatten(1, split).amax(2)
        return Costs(layout, cost, alive, rank)

    def of_weights(self, mask: Tensor) -> Tensor:
        """Expand a mask of groups to the parameter's weights."""
        return mask.repeat_interleave(self.group).reshape(self.layout.shape) if self.group > 1 else mask


def total_cost(costs: Mapping[str, Costs], masks: Mapping[str, Tensor]) -> float:
    """Sum the costs of the weights that were alive and whose mask (name -> bool tensor) is now False."""
    totals = []
    for name, c in costs.items():
        pruned = c.alive & ~c.layout.to_blocks(masks[name])
        totals.append(torch.where(pruned, c.cost, 0).sum(dtype=torch.float64))
    return sum(read(totals))
