"""Curvature models: what each says of the Fisher matrix and its inverse."""

from typing import Any, Optional, Union

from fishleg_ext.common.arguments import checked_damping
from fishleg_ext.curvature.base import Blocks, Curvature, CurvatureError
from fishleg_ext.curvature.block import BlockFisher
from fishleg_ext.curvature.diagonal import DiagonalFisher
from fishleg_ext.curvature.fishleg import FishLeg
from fishleg_ext.curvature.fishleg_adam import Adam
from fishleg_ext.curvature.identity import Identity
from fishleg_ext.curvature.kfac import Kronecker
from fishleg_ext.curvature.layerwise import Layerwise
from fishleg_ext.curvature.low_rank import LowRankFisher
from fishleg_ext.curvature.monitor import LossCurves

__all__ = [
    "Adam",
    "BlockFisher",
    "Blocks",
    "Curvature",
    "CurvatureError",
    "DiagonalFisher",
    "FishLeg",
    "Identity",
    "Kronecker",
    "Layerwise",
    "LossCurves",
    "LowRankFisher",
    "make_curvature",
]


def make_curvature(
    curvature: Union[str, Curvature],
    *,
    block_size: int = 128,
    damping: Optional[float] = None,
    argument: str = "curvature",
) -> Curvature:
    """A curvature model by name, or the given one.

    Args:
        curvature: "identity", "diagonal", "block", "low_rank", "layerwise", "kronecker", "fishleg", or a `Curvature`.
        block_size: weights in a block, for the models that have blocks.
        damping: in the units of a squared gradient (layerwise: of the mean of the diagonal); None is the model's
            default.
        argument: its name in errors.

    Raises:
        ValueError: an unknown name, or damping given beside an instance, which has its own.
        TypeError: neither a name nor a `Curvature`.
    """
    given: dict[str, Any] = {} if damping is None else {"damping": checked_damping(damping, positive=False)}
    if isinstance(curvature, Curvature):
        if given:
            raise ValueError(
                f"expected damping=None beside a curvature instance, got {damping}; "
                f"set it on {type(curvature).__name__}"
            )
        return curvature
    if not isinstance(curvature, str):
        raise TypeError(f"expected {argument} to be a name or a Curvature, got {type(curvature).__name__}")
    if curvature == "identity":
        return Identity()
    if curvature == "diagonal":
        return DiagonalFisher(**given)
    if curvature == "block":
        return BlockFisher(block_size, **given)
    if curvature == "low_rank":
        return LowRankFisher(block_size, **given)
    if curvature == "layerwise":
        return Layerwise(**given)
    if curvature == "kronecker":
        return Kronecker(**given)
    if curvature == "fishleg":
        return FishLeg(block_size=block_size, **given)
    raise ValueError(
        f"expected {argument} to be identity, diagonal, block, low_rank, layerwise, kronecker or fishleg, "
        f"got {curvature!r}"
    )
