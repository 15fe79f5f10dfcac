"""Masks of one bit per weight: pack them, unpack them, apply them to many tensors at once."""

import math

import torch
from torch import Tensor

from fishleg_ext.ops import checks
from fishleg_ext.ops.dispatch import op
from fishleg_ext.reference import masks as reference


def _packed_size(numel: int) -> int:
    return (numel + 7) // 8


def _fake_pack_mask(mask: Tensor) -> Tensor:
    return mask.new_empty(_packed_size(mask.numel()), dtype=torch.uint8)


@op(reference=reference.pack_mask, fake=_fake_pack_mask)
def pack_mask(mask: Tensor, *, impl: str = "auto") -> Tensor:
    """Pack a mask into one bit per weight: bit j of byte i is entry 8 i + j in row-major order.

    Args:
        mask: bool, any shape of n entries.

    Returns:
        packed uint8 [ceil(n / 8)]; the bits past n are 0.

    Raises:
        TypeError: mask is not bool.

    Examples:
        >>> pack_mask(torch.tensor([True, False, True]))
        tensor([5], dtype=torch.uint8)
    """
    checks.boolean(mask=mask)


def _fake_unpack_mask(packed: Tensor, shape: list[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.bool)


@op(reference=reference.unpack_mask, fake=_fake_unpack_mask)
def unpack_mask(packed: Tensor, shape: list[int], *, impl: str = "auto") -> Tensor:
    """The inverse of `pack_mask`.

    Args:
        packed: uint8 [ceil(n / 8)].
        shape: of the mask, n entries.

    Returns:
        mask, bool of this shape.

    Raises:
        TypeError: packed is not uint8.
        ValueError: packed has another size than a mask of this shape.

    Examples:
        >>> unpack_mask(torch.tensor([5], dtype=torch.uint8), [3])
        tensor([ True, False,  True])
    """
    check_packed("packed", packed, shape)


@op(reference=reference.apply_masks_, mutates=("tensors",), kernels=("triton",))
def apply_masks_(tensors: list[Tensor], packed_masks: list[Tensor], *, impl: str = "auto") -> None:
    """Set the pruned entries of many tensors to zero, whatever they hold (NaN and inf too).

    Args:
        tensors: floating point, any shapes; weights, gradients, optimizer state. Changed in place.
        packed_masks: as many results of `pack_mask`, in row-major order of the tensor's shape.

    Raises:
        TypeError: a tensor is not dense and floating point, or a packed mask not uint8.
        ValueError: lengths, sizes or devices do not fit, or a tensor is expanded.
    """
    checks.same_length("tensors", tensors, "packed_masks", packed_masks)
    for index, (tensor, packed) in enumerate(zip(tensors, packed_masks, strict=True)):
        # A training step has this call: names and messages are made up only where something is wrong.
        if (
            tensor.is_floating_point()
            and tensor.layout is torch.strided
            and tensor.is_contiguous()
            and packed.dtype is torch.uint8
            and packed.dim() == 1
            and packed.numel() == _packed_size(tensor.numel())
            and packed.device == tensor.device
        ):
            continue
        name, packed_name = f"tensors[{index}]", f"packed_masks[{index}]"
        checks.dense_floating(**{name: tensor})
        checks.writable(name, tensor)
        check_packed(packed_name, packed, list(tensor.shape))
        checks.same_device(**{name: tensor, packed_name: packed})


def check_packed(name: str, packed: Tensor, shape: list[int]) -> None:
    """Check that it is the packed mask of a tensor of this shape."""
    if packed.dtype != torch.uint8:
        raise TypeError(f"expected {name} of dtype torch.uint8, got {packed.dtype}")
    size = _packed_size(math.prod(shape))
    if tuple(packed.shape) != (size,):
        raise ValueError(
            f"expected {name} of shape [{size}], one bit for each entry of a mask of shape {list(shape)}, "
            f"got {list(packed.shape)}"
        )
