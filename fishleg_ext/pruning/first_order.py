"""The first-order term of the loss, which is not zero where training has not ended.

With gradient g the quadratic model of the loss has its minimum not at the weights w but at w - F^-1 g. Pruning w under
that gradient is pruning w - F^-1 g without one: Singh and Alistarh, WoodFisher, NeurIPS 2020, section 3.3 and appendix
(WoodTaylor), where that step is taken whole. The quadratic model is none so far away where F is nearly singular, so it
is taken here half as far as the loss itself falls: of a parabola's fall three quarters are in the first half of the way
to its bottom, and weights that have moved less are better described by what was observed before they moved.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from fishleg_ext.estimate import Estimate
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.observation.losses import losses_along, mean_gradient
from fishleg_ext.pruning.compensation import exact_update

SHARES = (0.0, *(2.0**-k for k in range(16)))  # of the step, at which the loss is looked at


class FirstOrderStep(NamedTuple):
    """What is taken off the weights before they are pruned.

    Attributes:
        step: name -> tensor, of weights and biases.
        gain: by how much it lowers the loss, by the quadratic model.
        share: how much of F^-1 g it is.
    """

    step: dict[str, Tensor] = {}  # noqa: RUF012  # never changed
    gain: float = 0.0
    share: float = 0.0

    def taken(self, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors less the steps of the names that they go by here."""
        return {key: x - self.step[names[key]] if self.step else x for key, x in tensors.items()}


def first_order_step(
    estimate: Estimate,
    masks: Mapping[str, Tensor],
    data: Iterable[Any],
    loss_fn: LossFunction,
    *,
    share: Optional[float] = None,
    dead_move: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> FirstOrderStep:
    """The step from the weights to where the quadratic model has its minimum, in the direction of it at least.

    Args:
        estimate: of the curvature, in the units of the loss, at the weights as they are.
        masks: name -> bool tensor, True = alive; the dead stay zero.
        data, loss_fn, seed: see `observe`; as many samples as the estimate has are read, once or twice.
        share: of the step; None is half of that of `SHARES` at which the loss on these samples is lowest.
        dead_move: whether products with the inverse move the dead, too, and others must make up for their staying.
        progress: show progress bars.
    """
    curvature, model = estimate.curvature, estimate.model
    moving = {name: model.get_parameter(name) for name in [*masks, *curvature.biases.values()]}
    read: dict[str, Any] = {"num_samples": estimate.samples, "seed": seed, "progress": progress}
    gradient = mean_gradient(model, data, loss_fn, moving, **read)
    gradient |= {name: gradient[name] * mask for name, mask in masks.items()}
    step: dict[str, Tensor] = {}
    for group in estimate.groups:
        estimate.hold(group)
        weights, biases = estimate.weights(group), estimate.biases(group)
        own = {name: curvature.biases[name] for name in biases}
        steps = curvature.mul({name: gradient[name] for name in [*group, *own.values()]})
        if dead_move and not all(bool(masks[name].all()) for name in group):
            there = {name: weight - steps[name] for name, weight in weights.items()}
            biases_there = {name: bias - steps[own[name]] for name, bias in biases.items()}
            back = exact_update(curvature, there, {name: masks[name] for name in group}, biases_there)
            steps = {name: moving[name].detach() - x for name, x in back.items()}
        step |= steps
    if share is None:
        start = {name: parameter.detach() for name, parameter in moving.items()}
        losses = losses_along(model, data, loss_fn, start, step, SHARES, **read)
        share = SHARES[int(torch.tensor(losses).nan_to_num(nan=torch.inf).argmin())] / 2
    slope = sum(float((gradient[name] * step[name]).sum(dtype=torch.float64)) for name in step)
    return FirstOrderStep({name: share * x for name, x in step.items()}, (share - share**2 / 2) * slope, share)
