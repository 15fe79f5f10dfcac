"""Selects the weights that are kept, given what pruning each costs."""

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
    rows: Mapping[str, int] | None = None,
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
        rows: name -> number of its rows, outputs say, each of which is pruned as much, with num_pruned of each name.

    Returns:
        name -> bool tensor, True = kept.
    """
    flops_per_weight, max_counts = flops_per_weight or {}, max_counts or {}
    groups = {name: c.of_groups() for name, c in costs.items()}
    ordered = {name: _in_order(c) for name, c in groups.items()}
    if rows is not None:
        assert isinstance(num_pruned, Mapping)
        kept = {}
        for name, (score, _) in ordered.items():
            by_row = groups[name].layout.from_blocks(score).reshape(rows[name], -1)
            kept_of_rows = keep_of_rows(by_row, num_pruned[name] // costs[name].group)
            kept[name] = groups[name].layout.to_blocks(kept_of_rows.reshape(groups[name].layout.shape))
    elif isinstance(num_pruned, Mapping):
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


def keep_of_rows(score: Tensor, num_pruned: int) -> Tensor:
    """Keep all but the `num_pruned` lowest of scores [rows, n], as many in each row as in the others, or one more.

    Which rows have one more is decided by the score of that one. Rows of which more has a score of -inf, that are
    pruned before, have as many fewer left for the others.

    Returns:
        bool [rows, n]; of ties the lower positions are pruned, and NaN is kept.
    """
    dead = (score == -torch.inf).sum(1).cpu()  # waited for here, and not in each step of the search
    possible = score.shape[1] - score.isnan().sum(1).cpu()
    level, highest = 0, score.shape[1]
    while level < highest:  # the highest level at which no more than num_pruned are pruned
        middle = (level + highest + 1) // 2
        total = int(torch.minimum(torch.full_like(dead, middle).maximum(dead), possible).sum())
        level, highest = (middle, highest) if total <= num_pruned else (level, middle - 1)
    counts = torch.minimum(torch.full_like(dead, level).maximum(dead), possible)  # [rows]
    order = score.argsort(dim=1, stable=True)  # NaN last
    left = num_pruned - int(counts.sum())
    candidates = ((counts == level) & (counts < possible)).to(score.device)
    counts = counts.to(score.device)
    if left > 0:
        following = order.gather(1, counts.clamp(max=score.shape[1] - 1)[:, None])
        costs = torch.where(candidates, score.gather(1, following)[:, 0], torch.nan)
        counts = counts + ~ops.keep_mask([costs], min(left, int(candidates.sum())))[0]
    pruned = torch.arange(score.shape[1], device=score.device) < counts[:, None]
    return ~torch.empty_like(pruned).scatter_(1, order, pruned)


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
