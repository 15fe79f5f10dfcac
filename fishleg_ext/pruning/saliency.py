"""Computes what pruning each weight costs, by an estimate of the curvature."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fishleg_ext import ops
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.progress import progress_bar
from fishleg_ext.curvature import Estimate
from fishleg_ext.pruning.costs import Costs
from fishleg_ext.sparsity.patterns import UNSTRUCTURED, Pattern


def simultaneous_costs(
    estimate: Estimate[Any],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    pattern: Pattern = UNSTRUCTURED,
) -> dict[str, Costs]:
    """Return each weight's cost as if it were pruned alone: w^2 / (2 [F^-1]_ii). Singh and Alistarh 2020, eq. 2.

    Of an n:m pattern the n weights of each m that cost most must be kept; a group costs the sum over its weights.
    """
    costs = {}
    for name, diagonal in estimate.diag().items():
        layout = BlockLayout(weights[name].shape, max(1, weights[name].numel()))
        cost, alive = layout.to_blocks(ops.obs_score(weights[name], diagonal)), layout.to_blocks(masks[name])
        if (must_keep := pattern.must_keep(torch.where(alive, cost, -torch.inf))) is not None:
            cost = cost.masked_fill(must_keep, torch.nan)
        costs[name] = Costs(layout, cost, alive, group=pattern.group)
    return costs


def exact_costs(
    estimate: Estimate[Any],
    weights: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    pattern: Pattern = UNSTRUCTURED,
    *,
    dead_first: bool = False,
    progress: bool = False,
) -> dict[str, Costs]:
    """Return each weight's cost after those of its block that are pruned before it, compensated by the others.

    Exact greedy elimination of every block; Kuznedelev et al., CAP, arXiv 2210.09223; Frantar and Alistarh, OBC,
    arXiv 2208.11580.

    Args:
        estimate: gives the inverse blocks.
        weights: name -> tensor.
        masks: name -> bool tensor, True = alive.
        pattern: of each m weights the n that would be pruned last must be kept; groups are pruned together.
        dead_first: the inverse is that of all weights, though some are pruned already.
        progress: show a progress bar.
    """
    costs = {}
    for name, weight in progress_bar(weights.items(), what="elimination", show=progress):
        layout = estimate.layouts[name]
        alive, rows = layout.to_blocks(masks[name]), layout.to_blocks(weight)
        found = []
        for part, blocks in estimate.blocks_at_a_time(name):
            # Without its bias the inverse is that of the weights when the bias is free to move.
            inverse = blocks.inverse[:, : layout.block_size, : layout.block_size]
            rank, cost = ops.obs_eliminate(
                blocks.scaled(rows[part]),
                inverse,
                alive[part],
                group=pattern.group,
                n=pattern.n,
                m=pattern.m,
                dead_first=dead_first,
            )
            found.append((rank, cost if blocks.cost_scale is None else cost * blocks.cost_scale))
            del blocks, inverse  # before the next are computed
        rank, cost = map(torch.cat, zip(*found, strict=True))
        if (must_keep := pattern.must_keep(rank.float())) is not None:
            cost = cost.masked_fill(must_keep, torch.nan)
        costs[name] = Costs(layout, cost, alive, rank, pattern.group)
    return costs
