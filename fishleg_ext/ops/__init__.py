"""The ops, one file per family; each is also `torch.ops.fishleg_ext.NAME`."""

from fishleg_ext.ops.block_fisher import block_gram_, block_inverse, woodbury_update_
from fishleg_ext.ops.diag_fisher import fisher_diag_update_
from fishleg_ext.ops.dispatch import use_impl
from fishleg_ext.ops.kron import foreach_kron_mul, kron_diag, kron_mul
from fishleg_ext.ops.masks import apply_masks_, pack_mask, unpack_mask
from fishleg_ext.ops.obs import obs_compensate, obs_eliminate, obs_quantize, obs_score
from fishleg_ext.ops.quantize import (
    assign_codes,
    dequantize_codebook,
    dequantize_fixed_point,
    pack_codes,
    unpack_codes,
)
from fishleg_ext.ops.select import keep_mask, nm_mask

__all__ = [
    "apply_masks_",
    "assign_codes",
    "block_gram_",
    "block_inverse",
    "dequantize_codebook",
    "dequantize_fixed_point",
    "fisher_diag_update_",
    "foreach_kron_mul",
    "keep_mask",
    "kron_diag",
    "kron_mul",
    "nm_mask",
    "obs_compensate",
    "obs_eliminate",
    "obs_quantize",
    "obs_score",
    "pack_codes",
    "pack_mask",
    "unpack_codes",
    "unpack_mask",
    "use_impl",
    "woodbury_update_",
]
