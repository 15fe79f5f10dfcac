"""The diagonal of the empirical Fisher matrix."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from fishleg_ext.common.arguments import checked_count, checked_positive, checked_type
from fishleg_ext.common.dtypes import widened
from fishleg_ext.common.layout import BlockLayout
from fishleg_ext.common.settings import setting
from fishleg_ext.common.waiting import read
from fishleg_ext.curvature.base import Blocks, Curvature, Estimate, curvature_entry, load_tensors
from fishleg_ext.observation.types import Observation


@dataclass(frozen=True)
class DiagonalFisher(Curvature):
    """F_i = damping + mean_s g_si^2. Costs are those of Tu et al. 2016, arXiv 1605.04859; nothing is compensated.

    Args:
        damping: added to each entry, > 0, in the units of a squared gradient.
    """

    damping: float = setting(1e-5, checked_positive)

    name: ClassVar[str] = "diagonal"
    default_saliency: ClassVar[str] = "simultaneous"

    @override
    def layout(self, name: str, weight: Tensor) -> BlockLayout:
        return BlockLayout(weight.shape, 1)

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "DiagonalEstimate":
        return DiagonalEstimate(self, weights, biases, **options)

    @staticmethod
    def from_optimizer(
        optimizer: torch.optim.Optimizer,
        model: nn.Module | None = None,
        *,
        batch_size: int = 1,
        root: bool = False,
        damping: float = 1e-12,
    ) -> "OptimizerFisher":
        """Read the diagonal off the second moment of Adam or AdamW, without a pass over the data.

        Tu et al. 2016, arXiv 1605.04859. The moment v / (1 - beta2^t) is a running mean of squared gradients of the
        mean loss of a *batch*: about F / batch_size + mean^2 where samples are independent, along the path of the last
        1 / (1 - beta2) steps. So its relative sizes tell what those of F do, and `batch_size` gives it the units of F.
        It is copied now.

        Args:
            optimizer: Adam, AdamW or another with `exp_avg_sq`, that has taken steps; or what wraps one.
            model: whose parameters it has; may be None where the optimizer was made of `model.named_parameters()`.
            batch_size: samples in each gradient.
            root: take the square root of the moment, as Choi et al. 2017 (arXiv 1612.01543) try: a flatter diagonal.
            damping: added to each entry, > 0.

        Returns:
            a recipe for `curvature=` of `prune`, `Pruner` and `quantize`, which then need no data.

        Raises:
            ValueError: it has no second moments, as SGD, or not yet; or parameters without names.
            TypeError: it is no optimizer.

        Examples:
            >>> layer = nn.Linear(2, 1, bias=False)
            >>> adam = torch.optim.Adam(layer.named_parameters())
            >>> layer(torch.tensor([1.0, 2.0])).backward()
            >>> adam.step()
            >>> recipe = DiagonalFisher.from_optimizer(adam)
            >>> recipe.recorded(["weight"])["weight"].square()
            tensor([[1., 4.]])
        """
        squares = second_moments(optimizer, model)
        if root:
            squares = {name: v.sqrt() for name, v in squares.items()}
        count = checked_count("batch_size", batch_size)
        return OptimizerFisher(damping=damping, squares=Recorded({name: count * v for name, v in squares.items()}))

    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        """Count one number a weight."""
        return weight.numel() * widened(weight.dtype).itemsize


class Recorded(dict[str, Tensor]):
    """Tensors by name, which are equal to themselves alone, so that a recipe that holds them can be compared."""

    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__

    def __repr__(self) -> str:
        """Name the parameters, without their values."""
        return f"<of {', '.join(self)}>"


@dataclass(frozen=True, kw_only=True)
class OptimizerFisher(DiagonalFisher):
    """The diagonal Fisher matrix that `DiagonalFisher.from_optimizer` read off an optimizer.

    Args:
        squares: name -> mean squared gradient, of the parameter's shape.
    """

    squares: Recorded = setting(None)

    name: ClassVar[str] = ""
    observes: ClassVar[frozenset[str]] = frozenset()

    def recorded(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return the roots of mean squares, which stand for one gradient."""
        if missing := [name for name in names if name not in self.squares]:
            raise ValueError(f"the optimizer had no second moment of {missing[0]}, has those of {list(self.squares)}")
        return {name: self.squares[name].sqrt() for name in names}


def second_moments(optimizer: torch.optim.Optimizer, model: nn.Module | None = None) -> dict[str, Tensor]:
    """Return the bias-corrected second moments of Adam or AdamW by parameter name; see `from_optimizer`."""
    inner: Any = optimizer
    while not isinstance(getattr(inner, "state", None), Mapping) and hasattr(inner, "optimizer"):
        inner = inner.optimizer
    checked_type("optimizer", inner, torch.optim.Optimizer, "a torch.optim.Optimizer")
    names: dict[int, str] = {}
    if model is not None:
        checked_type("model", model, nn.Module, "an nn.Module")
        names = {id(parameter): name for name, parameter in model.named_parameters()}
    for group in inner.param_groups if model is None else ():
        names |= {id(p): name for p, name in zip(group["params"], group.get("param_names", ()), strict=False)}
    kind, found = type(inner).__name__, {}
    for group in inner.param_groups:
        for parameter in group["params"]:
            state = inner.state.get(parameter, {})
            if "exp_avg_sq" not in state:
                continue
            if id(parameter) not in names:
                raise ValueError(
                    "expected names of the optimizer's parameters: make it of model.named_parameters(), or give model="
                )
            beta = float(group["betas"][1])
            moment = state["exp_avg_sq"].detach()
            found[names[id(parameter)]] = moment.to(widened(moment.dtype)) / (1 - beta ** float(state["step"]))
    if not found:
        has_moments = all("betas" in group for group in inner.param_groups)
        why = "has taken no step" if has_moments and not inner.state else "keeps no second moments (exp_avg_sq)"
        raise ValueError(f"expected Adam or AdamW after some steps, got {kind} that {why}")
    return found


class DiagonalEstimate(Estimate[DiagonalFisher]):
    """Sums of squared gradients."""

    def __init__(self, recipe: DiagonalFisher, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._squares = {
            name: torch.zeros(w.shape, dtype=widened(w.dtype), device=w.device) for name, w in weights.items()
        }
        self._count = 0

    @override
    def update(self, observation: Observation) -> None:
        for name in observation.gradients:
            squares = self._squares[name]
            squares += observation.sum_of_squares(name, squares)
        self._count += observation.count

    @override
    def mul(self, v: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x * self._inverse(name) for name, x in v.items()}

    @override
    def diag(self) -> dict[str, Tensor]:
        return {name: self._inverse(name) for name in self._squares}

    @override
    def blocks(self, name: str) -> Blocks:
        return Blocks(self._inverse(name).reshape(-1, 1, 1))

    @override
    def step_cost(self, step: Mapping[str, Tensor]) -> float:
        return 0.5 * sum(read((dw.double().square() / self._inverse(name)).sum() for name, dw in step.items()))

    def state_dict(self) -> dict[str, Any]:
        """Return sums of squares and how many gradients went into them."""
        return {"count": self._count, "squares": dict(self._squares)}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        load_tensors(self._squares, curvature_entry(state, "squares"))
        self._count = int(curvature_entry(state, "count"))

    @override
    def _merge(self, other: "DiagonalEstimate") -> None:
        for name, squares in self._squares.items():
            squares += other._squares[name].to(squares.device)
        self._count += other._count

    def _inverse(self, name: str) -> Tensor:
        return 1 / (self._squares[name] / max(1, self._count) + self.recipe.damping)
