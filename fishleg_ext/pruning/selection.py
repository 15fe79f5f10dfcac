"""Which weights are kept, given what pruning each costs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.pruning.costs import Costs


def select(
    costs: Mapping[str, Costs],
    num_pruned: int | Mapping[str, int],
    *,
    flops_per_weight: Mapping[str, float] | None = None,
    max_counts: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Choose masks with an exact count, the weights pruned before among the pruned.

    Where costs have ranks, what is pruned is a prefix of each block's order: along it a weight costs what the most
    expensive one so far does (the running maximum), and selecting by that in rank order never skips a weight.

    Args:
        costs: name -> costs.
        num_pruned: how many weights of all parameters together are pruned afterwards; or name -> how many of it. Where
            weights go in groups, a multiple of their size.
        flops_per_weight: name -> operations that pruning one of its weights saves; where parameters compete it is the
            cost over that which counts. 1 for those not in it.
        max_counts: name -> how many of its weights may be pruned in the competition; all for those not in it.

    Returns:
        name -> bool tensor, True = kept.
    """
    flops_per_weight, max_counts = flops_per_weight or {}, max_counts or {}
    groups = {name: c.of_groups() for name, c in costs.items()}
    ordered = {name: _in_order(c) for name, c in groups.items()}
    if isinstance(num_pruned, Mapping):
        kept = {n: ops.keep_mask([score], num_pruned[n] // costs[n].group)[0] for n, (score, _) in ordered.items()}
    else:
        scores = []
        for name, (score, _) in ordered.items():
            if name in max_counts:
                keep_most_expensive = ops.keep_mask([score], max_counts[name] // costs[name].group)[0]
                score = score.masked_fill(keep_most_expensive, torch.nan)
            scores.append(score / flops_per_weight[name] if name in flops_per_weight else score)
        size = next(iter(costs.values())).group if costs else 1
        kept = dict(zip(ordered, ops.keep_mask(scores, num_pruned // size), strict=True))
    masks = {}
    for name, (_, order) in ordered.items():
        blocks = kept[name]
        if order is not None:
            blocks = torch.empty_like(blocks).scatter_(1, order, blocks)
        masks[name] = costs[name].of_weights(groups[name].layout.from_blocks(blocks))
    return masks


def _in_order(costs: Costs) -> tuple[Tensor, Tensor | None]:
    """Scores in the order in which the weights of each block are pruned, and that order (None: as they lie), [K, B].

    The dead score -inf, as they are pruned already, and come first. Padding and what must be kept score NaN, which
    `keep_mask` keeps, and come last.
    """
    must_keep = costs.alive & costs.cost.isnan() | ~costs.layout.is_weight(costs.cost.device)
    score = torch.where(costs.alive, costs.cost, -torch.inf)
    score = torch.where(must_keep, torch.nan, score)
    if costs.rank is None:
        return score, None
    position = torch.where(costs.alive, costs.rank, -1)
    position = torch.where(
        must_keep, torch.iinfo(position.dtype).max, position
    )  # ranks of groups may exceed their number
    order = position.argsort(dim=1, stable=True)
    return score.gather(1, order).cummax(dim=1).values, order
