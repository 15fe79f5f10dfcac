"""What a pruning returns."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fishleg_ext.config import PruneConfig


@dataclass(frozen=True)
class PruneResult:
    """The outcome of a pruning.

    Attributes:
        masks: name -> bool tensor, True = kept.
        sparsity: pruned weights over all weights that could be pruned.
        layer_sparsity: name -> pruned weights over weights of one parameter.
        predicted_loss_increase: by the curvature model, the exact joint cost of pruning these weights with all others
            free to compensate (for block models those of the same block); summed over rounds. Of layerwise curvature
            that is half the squared error of all layers' outputs, not of the network's loss.
        history: a dict for each round: "sparsity", "layer_sparsity", "num_grads", "predicted_loss_increase",
            "damping_raised" (name -> blocks) and "seconds" (stage -> seconds); with first_order also
            "first_order_share", how much of the step was taken. JSON-able.
        config: the settings of the pruning; None where they are not known, as of a file that was written without them.
    """

    masks: dict[str, Tensor] = field(repr=False)
    sparsity: float
    layer_sparsity: dict[str, float] = field(repr=False)
    predicted_loss_increase: float
    history: list[dict[str, Any]] = field(repr=False)
    config: PruneConfig | None = field(default=None, repr=False)
