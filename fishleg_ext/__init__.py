"""Second-order pruning of neural networks: curvature models, fused ops, and one call that prunes.

`prune` prunes a model, `Pruner` does it over a training run, along a `schedule`; `ops` holds the ops for code of your
own. Importing this initialises no CUDA.
"""

from fishleg_ext import checkpoint, curvature, ops, schedule
from fishleg_ext.config import PruneConfig
from fishleg_ext.curvature import CurvatureError
from fishleg_ext.oneshot import prune
from fishleg_ext.ops import use_impl
from fishleg_ext.pruner import Pruner
from fishleg_ext.result import PruneResult

__version__ = "0.1.0"

__all__ = [
    "CurvatureError",
    "PruneConfig",
    "PruneResult",
    "Pruner",
    "checkpoint",
    "curvature",
    "ops",
    "prune",
    "schedule",
    "use_impl",
]
