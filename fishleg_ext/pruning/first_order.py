"""The first-order term of the loss, which is not zero where training has not ended.

With gradient g the quadratic model of the loss has its minimum not at the weights w but at w - F^-1 g. Pruning w under
that gradient is pruning w - F^-1 g without one: Singh and Alistarh, WoodFisher, NeurIPS 2020, section 3.3 and appendix
(WoodTaylor), where that step is taken whole. The quadratic model is none so far away where F is nearly singular, so it
is taken here half as far as the loss itself falls: of a parabola's fall three quarters are in the first half of the way
to its bottom, and weights that have moved less are better described by what was observed before they moved.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fishleg_ext.common.state import state_entry
from fishleg_ext.common.waiting import read
from fishleg_ext.estimator import Estimator
from fishleg_ext.observation.likelihoods import LossFunction
from fishleg_ext.observation.losses import losses_along, mean_gradient
from fishleg_ext.pruning.compensation import exact_update

SHARES = (0.0, *(2.0**-k for k in range(16)))  # of the step, at which the loss is evaluated


@dataclass(frozen=True)
class FirstOrderStep:
    """A step that is subtracted from the weights before they are pruned.

    Attributes:
        step: name -> tensor, of weights and biases; empty where there is none.
        gain: by how much it lowers the loss, by the quadratic model.
        share: how much of F^-1 g it is.
        slope: name -> the gradient that is left after the step, (1 - share) g; empty where there is none.
    """

    step: Mapping[str, Tensor] = field(default_factory=dict)
    gain: float = 0.0
    share: float = 0.0
    slope: Mapping[str, Tensor] = field(default_factory=dict)

    def rise(self, moves: Mapping[str, Tensor]) -> float:
        """Return by how much moves from where the step leads raise the loss to first order; name -> move."""
        if not self.slope:
            return 0.0
        return sum(read((self.slope[name] * move).sum(dtype=torch.float64) for name, move in moves.items()))

    def subtract_from(self, tensors: Mapping[str, Tensor], names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """Subtract the step; `names` maps a key of `tensors` to the parameter's name where these differ."""
        if not self.step:
            return dict(tensors)
        return {key: x - self.step[names[key] if names else key] for key, x in tensors.items()}

    def state_dict(self) -> dict[str, Any]:
        """Return the step, its gain and share, and the slope."""
        return {"step": dict(self.step), "gain": self.gain, "share": self.share, "slope": dict(self.slope)}

    @classmethod
    def of_state(cls, state: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> "FirstOrderStep":
        """Make what `state_dict` returned, for these parameters; ValueError where it is of others."""
        step, gain, share = (state_entry(state, key, "a first-order step") for key in ("step", "gain", "share"))
        shapes = {name: list(parameter.shape) for name, parameter in parameters.items()}
        if step and {name: list(tensor.shape) for name, tensor in step.items()} != shapes:
            raise ValueError(f"expected a first-order step of {', '.join(shapes)}, got {', '.join(step)}")
        slope = state.get("slope", {})  # which states of 0.1 do not have
        here = lambda tensors: {name: tensor.to(parameters[name].device) for name, tensor in tensors.items()}
        return cls(here(step), gain, share, here(slope))


def first_order_step(
    estimator: Estimator,
    masks: Mapping[str, Tensor],
    data: Iterable[Any],
    loss_fn: LossFunction | None,
    *,
    share: float | None = None,
    dead_move: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> FirstOrderStep:
    """Compute the step from the weights towards the minimum of the quadratic model.

    Args:
        estimator: of the curvature, in the units of the loss, at the weights as they are.
        masks: name -> bool tensor, True = kept; pruned weights stay zero.
        data, loss_fn, seed: see `observe`; as many samples as the estimate has are read, once or twice.
        share: of the step; None is half of that of `SHARES` at which the loss on these samples is lowest.
        dead_move: whether products with the inverse move the pruned, too, and others must compensate for these staying.
        progress: show progress bars.
    """
    model, own_biases = estimator.model, estimator.known_biases
    moving = {name: model.get_parameter(name) for name in [*masks, *own_biases.values()]}
    reading: dict[str, Any] = {"num_samples": estimator.samples, "seed": seed, "progress": progress}
    gradient = mean_gradient(model, data, loss_fn, moving, **reading)
    gradient |= {name: gradient[name] * mask for name, mask in masks.items()}
    step: dict[str, Tensor] = {}
    for group in estimator.groups:
        estimate = estimator.hold(group)
        weights, biases = estimator.weights(group), estimator.biases(group)
        own = {name: own_biases[name] for name in biases}
        steps = estimate.mul(estimator.oriented({name: gradient[name] for name in [*group, *own.values()]}))
        steps = estimator.as_parameters(steps)
        if dead_move and not all(bool(masks[name].all()) for name in group):
            moved = {name: weight - steps[name] for name, weight in weights.items()}
            moved_biases = {name: bias - steps[own[name]] for name, bias in biases.items()}
            kept = estimator.oriented({name: masks[name] for name in group})
            back = estimator.as_parameters(exact_update(estimate, estimator.oriented(moved), kept, moved_biases))
            steps = {name: moving[name].detach() - x for name, x in back.items()}
        step |= steps
        del estimate  # before the next group's is made
    if share is None:
        start = {name: parameter.detach() for name, parameter in moving.items()}
        losses = losses_along(model, data, loss_fn, start, step, SHARES, **reading)
        share = SHARES[int(torch.tensor(losses).nan_to_num(nan=torch.inf).argmin())] / 2
    slope = sum(read((gradient[name] * step[name]).sum(dtype=torch.float64) for name in step))
    left = {name: (1 - share) * gradient[name] for name in step} if share < 1 else {}
    return FirstOrderStep({name: share * x for name, x in step.items()}, (share - share**2 / 2) * slope, share, left)
