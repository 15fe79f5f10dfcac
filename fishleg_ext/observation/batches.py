"""Reads data: batches of any size, re-cut into chunks."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fishleg_ext.common.arguments import checked_function, checked_type
from fishleg_ext.observation.likelihoods import LossFunction

CHUNK_SAMPLES = 64  # whose activations are held at a time


def chunks(data: Iterable[Any], size: int, limit: int, device: torch.device) -> Iterator[tuple[Any, Any, int]]:
    """Re-cut batches into chunks of exactly `size` samples, the last one smaller, `limit` samples in all.

    Yields:
        inputs, targets and their number of samples; tensors on `device`.
    """
    held: list[Tensor] = []
    spec = None
    remaining = limit
    if remaining <= 0:
        return
    for batch in data:
        leaves, batch_spec = pytree.tree_flatten(_pair(batch))
        count = _batch_size(leaves)
        if spec is not None and batch_spec != spec:
            raise TypeError(f"expected every batch of the structure of the first, {spec}, got {batch_spec}")
        spec = batch_spec
        leaves = [leaf[:remaining].to(device) for leaf in leaves]
        remaining -= min(count, remaining)
        held = [torch.cat(pair) for pair in zip(held, leaves, strict=True)] if held else leaves
        while len(held[0]) >= size:
            yield *pytree.tree_unflatten([leaf[:size] for leaf in held], spec), size
            held = [leaf[size:] for leaf in held]
        if remaining == 0:
            break
    if held and len(held[0]):
        assert spec is not None
        yield *pytree.tree_unflatten(held, spec), len(held[0])


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise TypeError(f"expected data to yield (inputs, targets) pairs, got {type(batch).__name__}")
    return batch[0], batch[1]


def _batch_size(leaves: Sequence[Any]) -> int:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or leaf.dim() == 0:
            raise TypeError(
                "expected batches of tensors whose first dimension is the sample, got a "
                f"{'tensor without dimensions' if isinstance(leaf, Tensor) else type(leaf).__name__}; "
                "a dataset of single samples goes through torch.utils.data.DataLoader"
            )
    sizes = sorted({len(leaf) for leaf in leaves})
    if len(sizes) != 1:
        raise ValueError(f"expected inputs and targets with as many samples each, got {sizes}")
    return sizes[0]


def require_rereadable(data: Iterable[Any], why: str) -> None:
    """Raise if the data can be iterated over only once."""
    if isinstance(data, Iterator):
        raise ValueError(
            f"expected data that can be read again, as {why}, got a one-shot {type(data).__name__}; "
            "pass a list or a DataLoader"
        )


def checked_source(data: Iterable[Any] | None, loss_fn: LossFunction) -> tuple[Any, LossFunction]:
    """Return data and loss if they are an iterable and a function."""
    if data is not None and not hasattr(data, "__getitem__"):  # which is enough to be iterated over
        checked_type("data", data, Iterable, "an iterable of batches")
    return data, checked_function("loss_fn", loss_fn, "a function of outputs and targets")
