"""Argument checks shared by the ops. Each message says what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor


def dense_floating(**tensors: Tensor) -> None:
    """Every tensor is strided, of a real floating-point dtype, and all are on one device."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise TypeError(f"expected {name} to be a dense (strided) tensor, got {tensor.layout}")
        if not tensor.is_floating_point():
            raise TypeError(f"expected {name} of a floating-point dtype, got {tensor.dtype}")
    same_device(**tensors)


def single_or_double(**tensors: Tensor) -> None:
    """Every tensor accumulates sums, so it is float32 or float64."""
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"expected {name} in float32 or float64, got {tensor.dtype}")


def boolean(**tensors: Tensor) -> None:
    """Every tensor is a dense mask."""
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided:
            raise TypeError(f"expected {name} to be a dense (strided) tensor, got {tensor.layout}")
        if tensor.dtype != torch.bool:
            raise TypeError(f"expected {name} of dtype torch.bool, got {tensor.dtype}")


def same_device(**tensors: Tensor) -> None:
    """Raise ValueError unless all tensors are on the device of the first."""
    named = iter(tensors.items())
    first_name, first = next(named)
    for name, tensor in named:
        if tensor.device != first.device:
            raise ValueError(f"expected {name} on the device of {first_name}, {first.device}, got {tensor.device}")


def shape(name: str, tensor: Tensor, layout: str, expected: Sequence[int]) -> None:
    """The tensor's shape is `expected`; `layout` names its dimensions, as in "[K, B, B]"."""
    if tuple(tensor.shape) != tuple(expected):
        raise ValueError(f"expected {name} of shape {layout} = {list(expected)}, got {list(tensor.shape)}")


def dims(name: str, tensor: Tensor, layout: str) -> None:
    """The tensor has as many dimensions as `layout` names, as in "[K, B, B]"."""
    expected = layout.count(",") + 1
    if tensor.dim() != expected:
        raise ValueError(f"expected {name} of shape {layout}, {expected} dimensions, got {list(tensor.shape)}")


def inverse_blocks(inverse: Tensor, num_blocks: int, block_size: int) -> None:
    """The inverse is one block for all, [1, B, B], or one for each, [K, B, B]."""
    dims("inverse", inverse, "[K or 1, B, B]")
    if inverse.shape[0] != 1:
        shape("inverse", inverse, "[K or 1, B, B]", (num_blocks, block_size, block_size))
    else:
        shape("inverse", inverse, "[1, B, B]", (1, block_size, block_size))


def writable(name: str, tensor: Tensor) -> None:
    """An in-place target holds one memory cell for each element."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(
            f"expected {name} with one memory cell per element, got an expanded tensor "
            f"(shape {list(tensor.shape)}, strides {list(tensor.stride())}); clone it first"
        )


def same_length(first_name: str, first: Sequence, second_name: str, second: Sequence) -> None:
    """Two lists are as long as each other and fit item by item."""
    if len(first) != len(second):
        raise ValueError(f"expected as many {second_name} as {first_name}, {len(first)}, got {len(second)}")
