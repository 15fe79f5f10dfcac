"""What saliency hands to selection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from fishleg_ext.common.layout import BlockLayout


@dataclass(frozen=True)
class Costs:
    """The costs of one parameter's weights.

    Attributes:
        layout: how the parameter is cut into K blocks of B.
        cost: [K, B]; +inf where unknown, NaN for weights that must stay.
        alive: bool [K, B]; False for weights pruned before and for padding.
        rank: int32 [K, B], the order in which each block's weights must go, as of `ops.obs_eliminate`; None where they
            may go in any order.
        group: consecutive weights that go together; divides B.
    """

    layout: BlockLayout
    cost: Tensor
    alive: Tensor
    rank: Optional[Tensor] = None
    group: int = 1

    def of_groups(self) -> "Costs":
        """The same with whole groups in the place of weights: their joint costs, the layout that of groups."""
        if self.group == 1:
            return self
        apart = lambda x: x.unflatten(1, (-1, self.group))
        layout = BlockLayout((self.layout.numel // self.group,), self.layout.block_size // self.group)
        rank = None if self.rank is None else apart(torch.where(self.alive, self.rank, -1)).amax(2)
        cost = apart(torch.where(self.alive, self.cost, 0)).sum(2)
        return Costs(layout, cost, apart(self.alive).any(2), rank)

    def of_weights(self, mask: Tensor) -> Tensor:
        """A mask of groups as one of the parameter's weights."""
        return mask.repeat_interleave(self.group).reshape(self.layout.shape) if self.group > 1 else mask


def total_cost(costs: Mapping[str, Costs], masks: Mapping[str, Tensor]) -> float:
    """The sum of the costs of the weights that were alive and whose mask (name -> bool tensor) is now False."""
    total = 0.0
    for name, c in costs.items():
        gone = c.alive & ~c.layout.to_blocks(masks[name])
        total += float(torch.where(gone, c.cost, 0).sum(dtype=torch.float64))
    return total
