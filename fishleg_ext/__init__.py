"""Second-order pruning and quantization of neural networks: curvature models, fused ops, and one call for each.

`prune` prunes a model, `plan` says beforehand what that takes block by block, `quantize` gives its weights codes,
`Pruner` prunes over a training run, along a `schedule`; `optim.FishLeg` trains one; `ops` holds the ops for code of
your own. Importing this initialises no CUDA.
"""

from fishleg_ext import checkpoint, curvature, ops, optim, schedule
from fishleg_ext.config import PruneConfig
from fishleg_ext.curvature import CurvatureError
from fishleg_ext.oneshot import prune
from fishleg_ext.ops import use_impl
from fishleg_ext.planning import plan
from fishleg_ext.pruner import Pruner
from fishleg_ext.quantized import QuantizedTensor, QuantizeResult, load_quantized
from fishleg_ext.quantizer import quantize
from fishleg_ext.result import PruneResult

__version__ = "0.1.0"

__all__ = [
    "CurvatureError",
    "PruneConfig",
    "PruneResult",
    "Pruner",
    "QuantizeResult",
    "QuantizedTensor",
    "checkpoint",
    "curvature",
    "load_quantized",
    "ops",
    "optim",
    "plan",
    "prune",
    "quantize",
    "schedule",
    "use_impl",
]
