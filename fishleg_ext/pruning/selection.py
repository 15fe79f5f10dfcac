"""Which weights are kept, given what it costs to lose each."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Optional, Union

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.pruning.costs import Costs


def select(
    costs: Mapping[str, Costs],
    num_pruned: Union[int, Mapping[str, int]],
    *,
    savings: Mapping[str, float] = MappingProxyType({}),
    most_pruned: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Keep masks with an exact count, the weights pruned before among them.

    Where costs have ranks, what goes is a prefix of each block's order: along it a weight costs what the most
    expensive one so far does (the running maximum), and selecting by that in rank order never skips a weight.

    Args:
        costs: name -> costs.
        num_pruned: how many weights of all parameters together are pruned afterwards; or name -> how many of it. Where
            weights go in groups, a multiple of their size.
        savings: name -> what losing one of its weights saves; where parameters compete it is the cost over that which
            counts. 1 for those not in it.
        most_pruned: name -> how many weights it may lose in the competition; all for those not in it.

    Returns:
        name -> bool tensor, True = kept.
    """
    groups = {name: c.of_groups() for name, c in costs.items()}
    queues = {name: _queue(c) for name, c in groups.items()}
    if isinstance(num_pruned, Mapping):
        kept = {n: ops.keep_mask([score], num_pruned[n] // costs[n].group)[0] for n, (score, _) in queues.items()}
    else:
        scores = []
        for name, (score, _) in queues.items():
            if name in most_pruned:  # what it would lose last of all stays
                score = score.masked_fill(ops.keep_mask([score], most_pruned[name] // costs[name].group)[0], torch.nan)
            scores.append(score / savings[name] if name in savings else score)
        size = next(iter(costs.values())).group if costs else 1
        kept = dict(zip(queues, ops.keep_mask(scores, num_pruned // size), strict=True))
    masks = {}
    for name, (_, order) in queues.items():
        blocks = kept[name]
        if order is not None:
            blocks = torch.empty_like(blocks).scatter_(1, order, blocks)
        masks[name] = costs[name].of_weights(groups[name].layout.from_blocks(blocks))
    return masks


def _queue(costs: Costs) -> tuple[Tensor, Optional[Tensor]]:
    """Scores in the order in which the weights of each block go, and that order (None: as they lie), both [K, B].

    The dead score -inf, as they are pruned already, and come first. Padding and what must stay score NaN, which
    `keep_mask` keeps, and come last.
    """
    stays = costs.alive & costs.cost.isnan() | ~costs.layout.is_weight(costs.cost.device)
    score = torch.where(costs.alive, costs.cost, -torch.inf)
    score = torch.where(stays, torch.nan, score)
    if costs.rank is None:
        return score, None
    position = torch.where(costs.alive, costs.rank, -1)
    position = torch.where(stays, torch.iinfo(position.dtype).max, position)  # ranks of groups may exceed their number
    order = position.argsort(dim=1, stable=True)
    return score.gather(1, order).cummax(dim=1).values, order
