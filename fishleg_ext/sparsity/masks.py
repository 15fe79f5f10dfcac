"""Holds masks of parameters, and keeps pruned weights at zero once they are pruned."""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fishleg_ext import ops
from fishleg_ext.common.arguments import checked_type
from fishleg_ext.common.waiting import read, read_by_name
from fishleg_ext.ops import checks


class Masks(Mapping[str, Tensor]):
    """A mask for each of some parameters: name -> bool tensor of its shape, True = kept.

    Args:
        weights: name -> parameter; all weights are kept at first.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter]) -> None:
        self.weights = dict(weights)
        self._keep = {name: torch.ones(w.shape, dtype=torch.bool, device=w.device) for name, w in self.weights.items()}
        # Of _keep, for `apply`, which comes after every optimizer step: by name, device and order of dimensions, None
        # where these lie in theirs.
        self._packed: dict[tuple[str, torch.device, tuple[int, ...] | None], Tensor] = {}
        self._pruned_counts: dict[str, int] = {}  # counted once, as a GPU is waited for; empty until then

    def __getitem__(self, name: str) -> Tensor:
        keep = self._keep[name] = self._keep[name].to(self.weights[name].device)
        return keep

    def __iter__(self) -> Iterator[str]:
        return iter(self._keep)

    def __len__(self) -> int:
        return len(self._keep)

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Replace the masks. The weights are left alone until `apply`.

        Raises:
            ValueError: a mask is missing, of an unknown parameter, or of the wrong shape; nothing is changed then.
            TypeError: a mask is no tensor of bool.
        """
        if masks.keys() != self._keep.keys():
            unexpected = sorted(masks.keys() ^ self._keep.keys())
            raise ValueError(
                f"expected masks of {', '.join(self._keep)}; these are missing or unknown: {', '.join(unexpected)}"
            )
        for name, mask in masks.items():
            checked_type(f"mask of {name}", mask, Tensor, "a tensor")
            checks.boolean(**{f"mask of {name}": mask})
            checks.shape(f"mask of {name}", mask, "of the parameter", self._keep[name].shape)
        self._keep = {name: masks[name].to(weight.device).clone() for name, weight in self.weights.items()}
        self._packed, self._pruned_counts = {}, {}

    def pruned_counts(self) -> dict[str, int]:
        """Name -> how many entries are False."""
        if not self._pruned_counts:
            kept = read_by_name({name: mask.sum() for name, mask in self.items()})
            self._pruned_counts = {name: mask.numel() - int(kept[name]) for name, mask in self.items()}
        return dict(self._pruned_counts)

    def num_revived(self) -> int:
        """How many pruned entries of the parameters are not zero, as before `apply`."""
        return int(sum(read(((self.weights[name].detach() != 0) & ~mask).sum() for name, mask in self.items())))

    def warn_of_revived(self) -> None:
        """Warn where pruned entries of the parameters are not zero."""
        if moved := self.num_revived():
            pruned = sum(self.pruned_counts().values())
            warnings.warn(
                f"{moved} of {pruned} pruned weights are not zero: was an optimizer not attached? attach(optimizer) "
                "keeps them at zero while it trains the others; apply_masks() sets them to zero now",
                stacklevel=3,
            )

    def sparsity(self) -> float:
        """Pruned entries over all entries."""
        total = sum(mask.numel() for mask in self.values())
        return sum(self.pruned_counts().values()) / max(1, total)

    def layer_sparsity(self) -> dict[str, float]:
        """Name -> pruned entries over entries."""
        return {name: pruned / max(1, self[name].numel()) for name, pruned in self.pruned_counts().items()}

    def apply(self, state: Mapping[Any, Mapping[str, Any]] | None = None) -> None:
        """Zero the pruned entries of the parameters, and of what an optimizer keeps for each of their entries.

        Args:
            state: of an optimizer: parameter -> name -> anything.
        """
        tensors, packed = [], []
        for name, weight in self.weights.items():
            kept = state.get(weight, {}).values() if state else ()
            for tensor in [weight.detach(), *(entry for entry in kept if _is_like(entry, weight))]:
                # As it lies in memory, so that kernels take channels_last weights too.
                order = None
                if not tensor.is_contiguous():
                    order = tuple(sorted(range(tensor.dim()), key=tensor.stride, reverse=True))
                    tensor = tensor.permute(order)
                place = name, tensor.device, order
                if place not in self._packed:
                    mask = self[name].to(tensor.device)
                    self._packed[place] = ops.pack_mask(mask if order is None else mask.permute(order))
                tensors.append(tensor)
                packed.append(self._packed[place])
        ops.apply_masks_(tensors, packed)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, packed; see `pack_masks`."""
        return pack_masks(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned.

        Raises:
            ValueError: the masks are of other parameters or shapes; nothing is changed then.
        """
        self.set({name: ops.unpack_mask(entry["packed"], entry["shape"]) for name, entry in state.items()})


def _is_like(entry: Any, weight: Tensor) -> bool:
    """Whether it is a tensor of numbers, one for each weight."""
    return isinstance(entry, Tensor) and entry.is_floating_point() and entry.shape == weight.shape


def pack_masks(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name -> {"shape", "packed"}, one bit a weight: for `torch.save`, and to load with `weights_only`."""
    return {name: {"shape": list(mask.shape), "packed": ops.pack_mask(mask)} for name, mask in masks.items()}
