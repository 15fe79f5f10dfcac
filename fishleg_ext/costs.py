"""What saliency hands to selection."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from fishleg_ext.layout import BlockLayout


@dataclass(frozen=True)
class Costs:
    """The costs of one parameter's weights.

    Attributes:
        layout: how the parameter is cut into K blocks of B.
        cost: [K, B]; +inf where unknown.
        alive: bool [K, B]; False for weights pruned before and for padding.
        rank: int32 [K, B], the order in which each block's weights must go, as of `ops.obs_eliminate`; None where they
            may go in any order.
    """

    layout: BlockLayout
    cost: Tensor
    alive: Tensor
    rank: Optional[Tensor] = None


def total_cost(costs: Mapping[str, Costs], masks: Mapping[str, Tensor]) -> float:
    """The sum of the costs of the weights that were alive and whose mask (name -> bool tensor) is now False."""
    total = 0.0
    for name, c in costs.items():
        gone = c.alive & ~c.layout.to_blocks(masks[name])
        total += float(torch.where(gone, c.cost, 0).sum(dtype=torch.float64))
    return total
