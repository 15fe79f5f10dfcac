"""Curvature models: what each says of the Fisher matrix and its inverse."""

import dataclasses
from typing import Any

from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError, Estimate
from fishleg_ext.curvature.block import BlockFisher
from fishleg_ext.curvature.diagonal import DiagonalFisher
from fishleg_ext.curvature.fishleg import FishLeg
from fishleg_ext.curvature.fishleg_adam import Adam
from fishleg_ext.curvature.identity import Identity
from fishleg_ext.curvature.kfac import Kronecker
from fishleg_ext.curvature.layerwise import Layerwise
from fishleg_ext.curvature.layerwise_diagonal import LayerwiseDiagonal
from fishleg_ext.curvature.low_rank import LowRankFisher
from fishleg_ext.curvature.monitor import LossCurves

__all__ = [
    "Adam",
    "BlockFisher",
    "Blocks",
    "Curvature",
    "CurvatureError",
    "DiagonalFisher",
    "Estimate",
    "FishLeg",
    "Identity",
    "Kronecker",
    "Layerwise",
    "LayerwiseDiagonal",
    "LossCurves",
    "LowRankFisher",
    "make_curvature",
    "make_recipes",
]

MODELS: dict[str, type[Curvature]] = {
    model.name: model
    for model in (
        Identity,
        DiagonalFisher,
        BlockFisher,
        LowRankFisher,
        LayerwiseDiagonal,
        Layerwise,
        Kronecker,
        FishLeg,
    )
}
# Settings that belong to the estimate rather than to the model of F: they fill what an instance leaves None.
SHARED = tuple(field.name for field in dataclasses.fields(Curvature))


def checked_curvature(name: str, value: Any) -> str | Curvature:
    """Return `value` if it is the name of a model or a recipe."""
    if isinstance(value, Curvature):
        return value
    if not isinstance(value, str):
        raise TypeError(f"expected {name} to be a name or a Curvature, got {value!r:.200}")
    if value not in MODELS:
        *names, last = MODELS
        raise ValueError(f"expected {name} to be {', '.join(names)} or {last}, got {value!r}")
    return value


def make_curvature(curvature: str | Curvature, **settings: Any) -> Curvature:
    """Make the recipe of a name, or fill in the settings that an instance leaves None.

    Args:
        curvature: "identity", "diagonal", "block", "low_rank", "layerwise_diagonal", "layerwise", "kronecker",
            "fishleg", or a `Curvature`.
        settings: of the recipe; None is as if it were not given.

    Raises:
        ValueError: an unknown name, a setting that the model cannot use, or a setting beside an instance that has its
            own.
        TypeError: neither a name nor a `Curvature`.
    """
    return make_recipes(curvature, None, settings)[0]


def make_recipes(
    curvature: str | Curvature, allocation: str | Curvature | None, settings: dict[str, Any]
) -> tuple[Curvature, Curvature | None]:
    """Make the recipes of a pruning from settings that are given once for both.

    A setting goes to each model that can use it, but `damping` to `curvature` alone, whose units may be others.

    Raises:
        ValueError, TypeError: see `make_curvature`; a setting that neither of the two can use.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    chosen = {"curvature": curvature} | ({} if allocation is None else {"allocation": allocation})
    models = {argument: checked_curvature(argument, model) for argument, model in chosen.items()}
    taken: set[str] = set()
    recipes = []
    for argument, model in models.items():
        usable = {n: v for n, v in given.items() if _can_use(model, n) and (n != "damping" or argument == "curvature")}
        recipes.append(model.with_settings(**usable) if isinstance(model, Curvature) else MODELS[model](**usable))
        taken |= usable.keys()
    for name in given.keys() - taken:
        _refuse(name, given[name], curvature)
    likelihoods = [recipe.likelihood for recipe in recipes if recipe.likelihood is not None]
    if likelihoods and not any(recipe.uses_likelihood for recipe in recipes):
        raise ValueError(
            f"likelihood={likelihoods[0]!r} cannot be combined with labels='data': labels are not sampled then; "
            "give labels='model'"
        )
    return recipes[0], recipes[1] if len(recipes) > 1 else None


def _can_use(model: str | Curvature, name: str) -> bool:
    """Say whether a setting beside a model may be used: an instance has its own but for the shared ones."""
    if name in ("labels", "likelihood"):
        observes = model.observes if isinstance(model, Curvature) else MODELS[model]().observes
        return bool(observes - {"inputs"})
    if isinstance(model, Curvature):
        return name in SHARED
    return name in {field.name for field in dataclasses.fields(MODELS[model])}


def _refuse(name: str, value: Any, curvature: str | Curvature) -> None:
    if isinstance(curvature, Curvature) and name not in SHARED:
        raise ValueError(
            f"{name}={value!r} cannot be combined with a curvature instance, which has settings of its own; set it on "
            f"{type(curvature).__name__}"
        )
    model = type(curvature).__name__ if isinstance(curvature, Curvature) else curvature
    raise ValueError(f"curvature {model!r} takes no {name}, got {name}={value!r}")
