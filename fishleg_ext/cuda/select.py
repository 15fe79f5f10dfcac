"""Launches csrc/select.cu."""

import torch
from torch import Tensor

from fishleg_ext.cuda import supports_device

INTEGERS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


def supports_keep_mask(scores: list[Tensor], num_pruned: int) -> tuple[bool, str]:
    """Scores of one dtype."""
    if not scores:
        return False, "its CUDA C++ kernel takes scores on a GPU, and there are none"
    dtypes = {score.dtype for score in scores}
    if len(dtypes) > 1:
        return False, f"its CUDA C++ kernel takes scores of one dtype, not of {', '.join(sorted(map(str, dtypes)))}"
    return supports_device(scores[0])


def keep_mask(scores: list[Tensor], num_pruned: int) -> list[Tensor]:
    """A pass over all scores for each byte of one, and at most two more."""
    masks = [torch.empty(score.shape, dtype=torch.bool, device=score.device) for score in scores]
    given = [(score.contiguous(), mask) for score, mask in zip(scores, masks, strict=True) if score.numel()]
    if num_pruned == sum(mask.numel() for mask in masks):  # no score is beyond the threshold
        return [mask.zero_() for mask in masks]
    dtype, device = scores[0].dtype, scores[0].device
    infinity = int(torch.tensor(torch.inf, dtype=dtype, device="cpu").view(INTEGERS.get(dtype, torch.int64)))
    private = torch.ops.fishleg_ext_cuda
    counts = torch.zeros(private.select_counts(dtype.itemsize), dtype=torch.int64, device=device)
    tiles = sum(private.select_tiles(score.numel()) for score, _ in given)
    ties = torch.empty(tiles, dtype=torch.int64, device=device)
    private.keep_mask_out([s for s, _ in given], infinity, num_pruned, [m for _, m in given], counts, ties)
    return masks
