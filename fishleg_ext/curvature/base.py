"""What every curvature model can do."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar, NamedTuple, Optional

import torch
from torch import Tensor

from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.observation.types import Observation


class CurvatureError(RuntimeError):
    """A curvature model that cannot be inverted; the message names the parameter."""


class Blocks(NamedTuple):
    """The inverse of one parameter as exact elimination needs it: scale * inverse * scale, block by block.

    A layer's bias is one more weight of each of its rows, the last, that moves with the others but is never lost.

    Attributes:
        inverse: [K or 1, B, B], or [K or 1, B + 1, B + 1] with the bias.
        weight_scale: [K, B] or [K, B + 1]; weights are divided by it before elimination, multiplied after. None is 1.
        cost_scale: [K, 1]; costs are multiplied by it. None is 1.
    """

    inverse: Tensor
    weight_scale: Optional[Tensor] = None
    cost_scale: Optional[Tensor] = None

    def rows(self, layout: BlockLayout, weight: Tensor, bias: Optional[Tensor], *masks: Tensor) -> list[Tensor]:
        """A parameter as [K, B] in the units of the inverse, with the bias where the inverse has it; and masks [K, B].

        The bias is in no mask. Both are in the wider dtype of the two.
        """
        rows = layout.to_blocks(weight)
        if self.inverse.shape[2] > layout.block_size:
            assert bias is not None
            rows = torch.cat([rows, bias[:, None]], dim=1)
            masks = tuple(torch.nn.functional.pad(mask, (0, 1)) for mask in masks)
        return [self.scaled(rows), *masks]

    def parts(self, layout: BlockLayout, rows: Tensor) -> list[Tensor]:
        """The inverse of `rows`: the parameter and, where there is one, the bias."""
        rows = self.unscaled(rows)
        weight = layout.from_blocks(rows[:, : layout.block_size])
        return [weight, rows[:, -1]] if rows.shape[1] > layout.block_size else [weight]

    def scaled(self, weight: Tensor) -> Tensor:
        """Weights [K, B], or with the bias [K, B + 1], in the units of the inverse; 0 where the scale is 0."""
        if self.weight_scale is None:
            return weight
        scale = self.weight_scale[:, : weight.shape[1]]
        return torch.where(scale != 0, weight / scale, 0)

    def unscaled(self, weight: Tensor) -> Tensor:
        """The inverse of `scaled`."""
        return weight if self.weight_scale is None else weight * self.weight_scale[:, : weight.shape[1]]


class Curvature(ABC):
    """A model of the Fisher matrix F of some weights, and of its inverse. Knows nothing of pruning.

    `start` names the weights, `update` takes in observations, the rest is then answered for those weights. Tensors go
    by parameter name and have the parameter's shape.

    Attributes:
        observes: what `update` needs: any of "gradients", "inputs", "output_gradients".
        block_diagonal: whether F has no entries between the blocks of `blocks`, so that costs of blocks add up.
        separable: whether each parameter can be estimated without the others.
        masked: whether the inverse is that of the weights that were alive at the estimate, as masked gradients make
            it. Else gradients are not masked, the inverse is that of all weights, and elimination must deal with the
            dead first.
        maskable: whether, where it is not masked, the rows and columns of the dead may be cleared from the inverse for
            single-weight scores, as FishLeg masks its scale.
        takes_biases: whether it can model a layer's bias together with the weight.
        biases: of the weights, whose layer has one -> its name. These biases move with the weights and are never lost;
            `update` and `mul` take them by name, beside the weights, and `mul` returns them. Set it before `start`.
        sequential: whether parameters are to be estimated and pruned one after the other.
        default_saliency, default_scope, default_labels, default_num_grads: what `prune` does unless told otherwise.
        damping_raised: name -> number of blocks whose damping had to be raised to invert them.
        progress: whether to show progress bars; `Pruner` sets it.
        carry_over: how many gradients an estimate counts for in the next one, which begins from it; 0 forgets it.
        passes: how often an estimate observes the same data, each time with other labels where these are sampled.
    """

    observes: ClassVar[frozenset[str]] = frozenset({"gradients"})
    block_diagonal: ClassVar[bool] = True
    separable: ClassVar[bool] = True
    masked: ClassVar[bool] = True
    maskable: ClassVar[bool] = False
    takes_biases: ClassVar[bool] = False
    default_saliency: ClassVar[str] = "exact"
    default_scope: ClassVar[str] = "global"
    default_labels: ClassVar[str] = "data"
    default_num_grads: ClassVar[int] = 1024
    carry_over: int = 0

    def __init__(self) -> None:
        self.progress = False
        self.sequential = False
        self.passes = 1
        self.damping_raised: dict[str, int] = {}
        self.biases: dict[str, str] = {}
        self.layouts: dict[str, BlockLayout] = {}

    def check(self, names: Collection[str]) -> None:  # noqa: B027
        """Raise ValueError where settings do not fit these parameters, which are all that `start` will ever name."""

    @abstractmethod
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        """How `blocks` cuts a parameter."""

    def start(self, weights: Mapping[str, Tensor]) -> None:
        """Forget everything observed and prepare for these weights."""
        self.layouts = {name: self.layout(name, weight) for name, weight in weights.items()}
        self.damping_raised = {}

    @abstractmethod
    def state_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """Bytes held for this weight while observations stream in."""

    def workspace_bytes(self, name: str, weight: Tensor, num_grads: int) -> int:
        """Bytes needed for a while, beside the state, to learn from an observation or to invert this weight's part."""
        return 2 * self.state_bytes(name, weight, num_grads)

    @abstractmethod
    def update(self, observation: Observation) -> None:
        """Take in one observation."""

    @abstractmethod
    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """F^-1 v."""

    @abstractmethod
    def diag(self) -> dict[str, Tensor]:
        """The diagonal of F^-1."""

    @abstractmethod
    def blocks(self, name: str) -> Blocks:
        """The diagonal blocks of F^-1 for one parameter, cut as `layouts[name]` says; computed at each call."""

    @abstractmethod
    def joint_cost(self, weights: Mapping[str, Tensor], pruned: Mapping[str, Tensor]) -> float:
        """The least loss increase of losing the set P of weights: 1/2 w_P^T (F^-1[P, P])^-1 w_P."""

    def state_dict(self) -> dict[str, Any]:
        """What was observed, as tensors and numbers. Models without state have none."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`, after `start` with the same weights; ValueError if it does not fit them."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got {sorted(state)}")


def load_tensors(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copy a saved tensor into each own one; ValueError where names or shapes differ."""
    if own.keys() != state.keys():
        raise ValueError(f"expected curvature of {', '.join(own)}, got that of {', '.join(state)}")
    for name, tensor in own.items():
        if tensor.shape != state[name].shape:
            raise ValueError(
                f"expected curvature of {name} of shape {list(tensor.shape)}, got {list(state[name].shape)}"
            )
    for name, tensor in own.items():
        tensor.copy_(state[name])


def state_entry(state: Mapping[str, Any], key: str) -> Any:
    """An entry of a saved state, or ValueError if it is that of another model."""
    if key not in state:
        raise ValueError(f"expected the state of a curvature model with {key!r}, got {sorted(state)}")
    return state[key]
