"""Which weights are kept, given what it costs to lose each."""

from collections.abc import Mapping
from typing import Optional, Union

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.costs import Costs


def select(costs: Mapping[str, Costs], num_pruned: Union[int, Mapping[str, int]]) -> dict[str, Tensor]:
    """Keep masks with an exact count, the weights pruned before among them.

    Where costs have ranks, what goes is a prefix of each block's order: along it a weight costs what the most
    expensive one so far does (the running maximum), and selecting by that in rank order never skips a weight.

    Args:
        costs: name -> costs.
        num_pruned: how many weights of all parameters together are pruned afterwards; or name -> how many of it.

    Returns:
        name -> bool tensor, True = kept.
    """
    queues = {name: _queue(c) for name, c in costs.items()}
    if isinstance(num_pruned, Mapping):
        kept = {name: ops.keep_mask([score], num_pruned[name])[0] for name, (score, _) in queues.items()}
    else:
        scores = [score for score, _ in queues.values()]
        kept = dict(zip(queues, ops.keep_mask(scores, num_pruned), strict=True))
    masks = {}
    for name, (_, order) in queues.items():
        blocks = kept[name]
        if order is not None:
            blocks = torch.empty_like(blocks).scatter_(1, order, blocks)
        masks[name] = costs[name].layout.from_blocks(blocks)
    return masks


def _queue(costs: Costs) -> tuple[Tensor, Optional[Tensor]]:
    """Scores in the order in which the weights of each block go, and that order (None: as they lie), both [K, B].

    The dead score -inf, as they are pruned already, and come first. Padding scores NaN, which `keep_mask` keeps, and
    comes last.
    """
    is_weight = costs.layout.is_weight(costs.cost.device)
    score = torch.where(costs.alive, costs.cost, -torch.inf)
    score = torch.where(is_weight, score, torch.nan)
    if costs.rank is None:
        return score, None
    position = torch.where(costs.alive, costs.rank, -1)
    position = torch.where(is_weight, position, costs.layout.block_size + 1)
    order = position.argsort(dim=1, stable=True)
    return score.gather(1, order).cummax(dim=1).values, order
