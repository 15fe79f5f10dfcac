"""What a pruning returns."""

from dataclasses import dataclass, field
from typing import Any

from tabulate import tabulate
from torch import Tensor

from fishleg_ext.config import PruneConfig


@dataclass(frozen=True)
class PruneResult:
    """The outcome of a pruning.

    Attributes:
        masks: name -> bool tensor, True = kept.
        sparsity: pruned weights over all weights that could be pruned.
        layer_sparsity: name -> pruned weights over weights of one parameter.
        predicted_loss_increase: by the curvature model, what the step that was taken costs, 1/2 dw^T F dw; summed over
            rounds. With saliency "exact" that is the joint cost, the least of any step that zeroes these weights (for
            block models moving weights of the same block alone). Of layerwise curvature it is half the squared error of
            all layers' outputs, not of the network's loss.
        history: a dict for each round: "sparsity", "layer_sparsity", "num_grads", "predicted_loss_increase",
            "damping_raised" (name -> blocks) and "seconds" (stage -> seconds); with first_order also
            "first_order_share", how much of the step was taken. JSON-able.
        dense: name -> why it stayed dense, of the other parameters of two dimensions and more.
        pattern: that the masks keep to.
        divergence: Kullback-Leibler divergence of the network's outputs from the dense one's on held-out samples, in
            nats per target; None where `holdout` is 0, and of a Pruner.
        config: the settings of the pruning; None where they are not known, as of a file that was written without them.
    """

    masks: dict[str, Tensor] = field(repr=False)
    sparsity: float
    layer_sparsity: dict[str, float] = field(repr=False)
    predicted_loss_increase: float
    history: list[dict[str, Any]] = field(repr=False)
    dense: dict[str, str] = field(default_factory=dict, repr=False)
    pattern: str = "unstructured"
    divergence: float | None = None
    config: PruneConfig | None = field(default=None, repr=False)

    @property
    def divergence_ratio(self) -> float | None:
        """Return the divergence over the predicted loss increase; None where it was not measured.

        About 1 where the quadratic model of the loss holds, with labels="model"; much more where it has broken. Less
        where damping, which counts in the prediction, is larger than the curvature.
        """
        if self.divergence is None or not self.predicted_loss_increase:
            return None
        return self.divergence / self.predicted_loss_increase

    def table(self) -> str:
        """Return a table of the parameters: shape, how much is pruned, in which pattern, why it stayed dense."""
        rows = []
        for name, mask in self.masks.items():
            pruned = self.layer_sparsity[name]
            rows.append([name, str(list(mask.shape)), f"{pruned:.2%}", self.pattern if pruned else "", ""])
        size = sum(mask.numel() for mask in self.masks.values())
        rows.append(["all", f"{size} weights", f"{self.sparsity:.2%}", "", ""])
        rows += [[name, "", "dense", "", why] for name, why in self.dense.items()]
        headers = ["parameter", "shape", "pruned", "pattern", "why it is dense"]
        return tabulate(rows, headers, tablefmt="plain", colalign=("left", "left", "right", "left", "left"))
