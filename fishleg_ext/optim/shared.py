"""Offers what an optimizer has learned of the curvature as a recipe that needs no data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from typing_extensions import override

from fishleg_ext.common.arguments import checked_positive
from fishleg_ext.common.settings import setting
from fishleg_ext.curvature.base import curvature_entry
from fishleg_ext.curvature.kronecker import Factors, KroneckerCurvature, KroneckerEstimate, factor_bytes, matrix_shape
from fishleg_ext.observation.types import Observation

if TYPE_CHECKING:
    from fishleg_ext.optim.fishleg import FishLeg


@dataclass(frozen=True)
class OptimizerCurvature(KroneckerCurvature):
    """The inverse that `optim.FishLeg` has learned, as it is when an estimate starts: a copy, without any data.

    McGowan et al., FishLeg Surgeon, arXiv 2412.02328, go on learning one inverse while a network is trained and pruned.
    Q = diag(p) (x) M here, a diagonal row factor, as exact elimination compensates within rows; damped by a number of
    its own, since a step needs far more damping than compensation.

    Args:
        source: the optimizer.
        damping: in the units of F, > 0. What Adam has learned has its own, that of the optimizer, and keeps it.
    """

    source: "FishLeg" = setting(None)
    damping: float = setting(1e-8, checked_positive)

    observes: ClassVar[frozenset[str]] = frozenset()

    def __deepcopy__(self, memo: Any) -> "OptimizerCurvature":
        """Stay with the same optimizer, as it is not copied."""
        return self

    @override
    def start(
        self, weights: Mapping[str, Tensor], biases: Mapping[str, str] | None = None, **options: Any
    ) -> "OptimizerEstimate":
        return OptimizerEstimate(self, weights, biases, **options)

    @override
    def state_bytes(self, name: str, weight: Tensor, num_grads: int, has_bias: bool = False) -> int:
        return factor_bytes(matrix_shape(weight, has_bias), weight.dtype, True)


class OptimizerEstimate(KroneckerEstimate[OptimizerCurvature]):
    """Copies of the factors."""

    stores_factors: ClassVar[bool] = True

    def __init__(self, recipe: OptimizerCurvature, weights: Mapping[str, Tensor], *args: Any, **options: Any) -> None:
        super().__init__(recipe, weights, *args, **options)
        self._factors = {
            name: recipe.source.factors(name, weight, recipe.damping, self.biases.get(name))
            for name, weight in weights.items()
        }

    @override
    def update(self, observation: Observation) -> None:
        raise TypeError("an optimizer's curvature observes nothing: the optimizer does, in its steps")

    @override
    def factors(self, name: str) -> Factors:
        return self._factors[name]

    def state_dict(self) -> dict[str, Any]:
        """Return the factors."""
        return {"factors": {name: tuple(factors) for name, factors in self._factors.items()}}

    @override
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        given = curvature_entry(state, "factors")
        self._factors = {name: Factors(*given[name]) for name in self.layouts}

    @override
    def _merge(self, other: Any) -> None:
        raise NotImplementedError("estimates of optimizers cannot be merged: each is what one of them has learned")
